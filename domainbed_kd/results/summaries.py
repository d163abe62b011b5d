"""The numbers behind a report's plots, as pandas tables made from `results.to_frame`.

All functions take rows with one test env each; see `by_test_env`. Accuracies are in [0, 1].
"""

import numpy as np

# Columns that identify the random search of a run.
_SEARCH = ["args.dataset", "args.algorithm", "test_env", "args.trial_seed"]
#: With fewer draws a rank correlation means next to nothing.
LEAST_DRAWS = 5
#: Diagnostics that `diagnostics` returns: {column: what it is}; `{}` is the held-out domain.
DIAGNOSTICS = {
    "diagnostics.weight_distance": "cumulative weight distance",
    "diagnostics.mutual_information_class": "information about the class, nats",
    "diagnostics.mutual_information_domain": "information about the domain, nats",
    "diagnostics.env{}_ece": "calibration error, held-out domain",
    "diagnostics.env{}_teacher_agreement": "agreement with the teacher, held-out domain",
    "filtered": "share of samples filtered (KDDG)",
    "selected_share": "share of samples selected (SCMD)",
}


def by_test_env(frame):
    """A row for each record and test env of it (`test_env`), with `test_acc` on that one.

    Runs that hold out two domains are left out, as only leave-one-out selection reads them.
    """
    rows = frame[frame["args.test_envs"].map(len) != 2]
    rows = rows.assign(test_env=rows["args.test_envs"]).explode("test_env", ignore_index=True)
    several = rows["args.test_envs"].map(len) > 1
    rows.loc[several, "test_acc"] = of_test_env(rows[several], "env{}_in_acc")
    return rows.astype({"test_env": int})


def numbers(values):
    """A column as floats; NaN for what is not a number, or too large to plot."""
    return values.map(lambda value: float(value) if isinstance(value, (int, float))
                      and abs(value) < 1e100 else np.nan).astype(float)


def chosen(frame, searches: dict, method: type):
    """The rows of the runs whose hparams a `SelectionMethod` chose in `searches`."""
    import pandas as pd

    best = []
    for (trial, dataset, algorithm, env), search in searches.items():
        if accs := method.hparams_accs(search):
            best.append((dataset, algorithm, env, trial, accs[0][1][0].args["hparams_seed"]))
    columns = [*_SEARCH, "args.hparams_seed"]
    return frame.merge(pd.DataFrame(best, columns=columns), on=columns)


def curves(frame):
    """Mean `val_acc` and `test_acc` by dataset, algorithm and step, over `chosen` runs.

    Steps that some of an algorithm's runs did not record are left out, as their mean would be over
    fewer runs.
    """
    by_step = frame.groupby(["args.dataset", "args.algorithm", "step"])
    means = by_step[["val_acc", "test_acc"]].mean()
    n_runs = by_step["run"].nunique()
    return means[n_runs == n_runs.groupby(level=[0, 1]).transform("max")].reset_index()


def costs(frame):
    """Mean seconds of updates in a run, by dataset and algorithm, over `chosen` runs.

    `step_time` is a mean over the steps since the last record. Evaluations and a teacher's own
    training are not counted.
    """
    ordered = frame.sort_values(["run", "step"])
    n_steps = ordered.groupby("run")["step"].diff().fillna(ordered["step"] + 1)
    seconds = (numbers(ordered["step_time"]) * n_steps).groupby(
        [ordered["args.dataset"], ordered["args.algorithm"], ordered["run"]]).sum(min_count=1)
    return seconds.groupby(level=[0, 1]).mean().rename("seconds").reset_index()


def hparam_effects(frame):
    """Spearman's rank correlation of each hparam with validation accuracy.

    Returns a table with `dataset`, `algorithm`, `hparam`, `rho` and `n_draws`, of all hparams
    that are numbers and vary. A draw is a trial and an hparams seed; its accuracy is the mean over
    test envs of its selected checkpoints' accuracies. Draws that lack a test env are left out, as
    are algorithms with fewer than `LEAST_DRAWS` draws.
    """
    import pandas as pd
    from scipy import stats

    rows = []
    names = [name for name in frame if name.startswith("hparams.")]
    best = frame[frame["selected"]]
    for (dataset, algorithm), group in best.groupby(["args.dataset", "args.algorithm"], sort=False):
        draws = group.groupby(["args.trial_seed", "args.hparams_seed"])
        whole = draws["test_env"].nunique() == group["test_env"].nunique()
        accuracy = draws["val_acc"].mean()[whole]
        for name in names if len(accuracy) >= LEAST_DRAWS else ():
            values = numbers(draws[name].first())[whole]
            if values.notna().all() and values.nunique() > 1:
                rho = stats.spearmanr(values, accuracy).statistic
                rows.append((dataset, algorithm, name.removeprefix("hparams."), rho, len(values)))
    return pd.DataFrame(rows, columns=["dataset", "algorithm", "hparam", "rho", "n_draws"])


def chance_correlation(n_draws: int) -> float:
    """The value that |rho| of 95 % of unrelated hparams stays below, by the t approximation."""
    from scipy import stats

    t = stats.t.ppf(0.975, n_draws - 2)
    return float(t / np.sqrt(n_draws - 2 + t ** 2))


def teachers(frame, everything):
    """Accuracy of `chosen` students and of their teachers on each held-out domain.

    Returns a table with `dataset`, `algorithm`, `test_env`, `student` and `teacher`. If diagnostics
    were recorded, both accuracies are on their images. Otherwise they are on the domain's in-split,
    if the teacher is a run of the same folder, looked up in `everything`. Other teachers were not
    measured there and have no row.
    """
    import pandas as pd

    best = frame[frame["selected"]]
    student = of_test_env(best, "diagnostics.env{}_acc")
    teacher = of_test_env(best, "diagnostics.env{}_teacher_acc")
    if "args.teacher" in frame:
        taught_by = everything[everything["selected"]].set_index(["run", "test_env"])["test_acc"]
        taught_by = taught_by[~taught_by.index.duplicated()]
        runs = best["args.teacher"].map(
            lambda path: str(path).rstrip("/").rpartition("/")[2], na_action="ignore")
        looked_up = taught_by.reindex(zip(runs, best["test_env"])).set_axis(best.index)
        student = student.where(teacher.notna(), best["test_acc"])
        teacher = teacher.fillna(looked_up)
    table = pd.DataFrame({"dataset": best["args.dataset"], "algorithm": best["args.algorithm"],
                          "test_env": best["test_env"], "student": student, "teacher": teacher})
    found = table.dropna().groupby(["dataset", "algorithm", "test_env"], sort=False)
    return found.mean().reset_index()


def of_test_env(frame, name: str):
    """For each row the number in column `name`, where `{}` is its test env; NaN without one."""
    import pandas as pd

    values = pd.Series(np.nan, index=frame.index)
    for env, rows in frame.groupby("test_env").groups.items():
        if (column := name.format(env)) in frame:
            values[rows] = numbers(frame.loc[rows, column])
    return values


def diagnostics(frame):
    """Means of the `DIAGNOSTICS` by dataset, algorithm and step; without unrecorded columns."""
    values = frame[["args.dataset", "args.algorithm", "step"]].copy()
    for name, label in DIAGNOSTICS.items():
        values[label] = of_test_env(frame, name)
    means = values.groupby(["args.dataset", "args.algorithm", "step"]).mean()
    return means.dropna(axis="columns", how="all").reset_index()
