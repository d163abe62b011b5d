"""What machine.py says where a GPU is there and torch cannot use it; torch only warns."""

import subprocess
import types
import warnings

import pytest
import torch

from domainbed_kd import machine
from domainbed_kd.sweep import workers

TOO_OLD = ("CUDA initialization: The NVIDIA driver on your system is too old (found version "
           "11040). Please update your GPU driver.")


def warns(text):
    def is_available():
        warnings.warn(text, stacklevel=2)
        return False

    return is_available


def test_a_run_on_a_driver_that_is_too_old_is_refused_and_not_moved_to_the_cpu(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", warns(TOO_OLD))
    with pytest.raises(OSError, match="driver is too old .* update it.*found version 11040"):
        machine.device()


@pytest.mark.parametrize("chosen", ["", "-1"])
def test_who_has_hidden_the_gpus_may_have_any_driver(chosen, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    monkeypatch.setattr(torch.cuda, "is_available", warns(TOO_OLD))
    with pytest.warns(UserWarning, match="too old"):
        assert machine.device().type == "cpu"


def test_other_warnings_are_passed_on(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", warns("something else"))
    with pytest.warns(UserWarning, match="something else"):
        assert machine.device().type == "cpu"


def test_multi_gpu_says_that_the_driver_is_too_old(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: types.SimpleNamespace(
        stdout="0\n", stderr=f"torch/cuda/__init__.py:1: UserWarning: {TOO_OLD}\n  return\n"))
    machine.n_gpus.cache_clear()
    try:
        with pytest.raises(OSError, match="driver is too old"):
            workers._visible_gpus()
    finally:
        machine.n_gpus.cache_clear()
