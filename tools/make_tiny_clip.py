"""Trains the tiny CLIP that ships with the package, on digits that it draws itself.

    python tools/make_tiny_clip.py [--out domainbed_kd/assets]

writes tiny_clip.safetensors, tiny_clip.json and the card tiny_clip.md. The network and the loss are
open_clip's. DigitsDG's images are used only at the end, to measure zero-shot accuracy. The same
seed, steps and number of threads give the same weights on the same machine.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import open_clip
import torch
from render_digits import NUMERALS, PROMPTS, WORDS, Renderer, caption, phrases
from safetensors import torch as safetensors

from domainbed_kd import clip_teacher, datasets

ASSETS = Path(__file__).parents[1] / "domainbed_kd" / "assets"
PROMPT = "a photo of a {}"
SIZE, MEAN, STD = 32, 0.5, 0.25  # the same for each channel
N_PROMPTS = 3  # per step


def config() -> dict:
    """open_clip's model_cfg and preprocess_cfg, and the text tower's vocabulary."""
    bpe = open_clip.SimpleTokenizer()
    tokens = sorted({token for text in phrases() for token in bpe.encode(text)})
    start, end = bpe.all_special_ids[:2]
    words = [bpe.decoder[token] for token in (start, *tokens, end)]
    # CLIP pools at the largest id, which must therefore be the end token's.
    vocabulary = ["<pad>", "<unknown>", *words]
    return {
        "model_cfg": {
            "embed_dim": 64,
            "vision_cfg": {"image_size": SIZE, "layers": [1, 1, 1, 1], "width": 16,
                           "head_width": 64},
            "text_cfg": {"context_length": 24, "vocab_size": len(vocabulary), "width": 64,
                         "heads": 2, "layers": 2}},
        "preprocess_cfg": {"size": SIZE, "mean": [MEAN] * 3, "std": [STD] * 3},
        "vocabulary": vocabulary}


def train(seed: int, steps: int, batch: int, lr: float) -> tuple[open_clip.CLIP, dict]:
    """The trained model and its config; progress goes to stderr.

    A quarter of each batch has individual captions, with open_clip's loss over all of them. The
    rest comes in groups of ten, one image of each digit with the same prompt, with the loss within
    each group: otherwise the network learns other differences between captions first, and digits
    late.
    """
    torch.manual_seed(seed)
    renderer, settings = Renderer(seed), config()
    model = open_clip.CLIP(**settings["model_cfg"])
    tokenizer = clip_teacher.TinyTokenizer(settings)
    clip_loss = open_clip.ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.05)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, (i + 1) / 100) * (1 + math.cos(math.pi * i / steps)) / 2)
    n_free = batch // 40 * 10
    start = time.perf_counter()
    for step in range(steps):
        images, labels, facts = renderer.batch(batch)
        texts = [caption(label, fact, renderer.choice)
                 for label, fact in zip(labels[:n_free].tolist(), facts)]
        prompts = [with_unknown_words(renderer) for _ in range(N_PROMPTS)]
        for prompt in prompts:
            names = renderer.choice((WORDS, WORDS, WORDS, WORDS, WORDS, WORDS, WORDS, NUMERALS))
            texts += [prompt.format(name) for name in names]
        image = model.encode_image((images - MEAN) / STD, normalize=True)
        text = model.encode_text(tokenizer(texts), normalize=True)
        scale = model.logit_scale.exp()

        free = clip_loss(image[:n_free], text[:n_free], scale)
        tens, prompted = image[n_free:].split(10), text[n_free:].split(10)
        ten = sum(clip_loss(images, prompted[i % N_PROMPTS], scale)
                  for i, images in enumerate(tens)) / len(tens)
        optimizer.zero_grad()
        (0.25 * free + 0.75 * ten).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))  # CLIP's own bound
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step}: loss {free.item():.3f} of captions, {ten.item():.3f} of tens, "
                  f"{time.perf_counter() - start:.0f} s", file=sys.stderr)
    return model.eval(), settings


def with_unknown_words(renderer: Renderer) -> str:
    """One of PROMPTS; in one case of five, a third of its words are unknown to the tokenizer."""
    prompt = renderer.choice(PROMPTS)
    if renderer.choice((True, False, False, False, False)):
        prompt = " ".join("{}" if "{}" in word else renderer.choice((word, word, "zebra"))
                          for word in prompt.split())
    return prompt


def save(model: open_clip.CLIP, settings: dict, folder: Path) -> None:
    """Writes the config and the weights, in half precision if they have more than one dimension."""
    weights = {name: weight.half() if weight.ndim > 1 else weight
               for name, weight in model.state_dict().items()}
    (folder / "tiny_clip.safetensors").write_bytes(safetensors.save(weights))
    text = json.dumps(settings, indent=1)
    (folder / "tiny_clip.json").write_text(text + "\n", encoding="utf-8")


@torch.no_grad()
def evaluate(folder: Path) -> dict[str, float]:
    """Zero-shot accuracy, in [0, 1], of the CLIP in a folder on each domain of DigitsDG."""
    model, tokenizer, _, mean, std = clip_teacher.tiny_clip(folder)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))
    digits = datasets.get_dataset_class("DigitsDG")(None, [], {})
    text = model.encode_text(tokenizer([PROMPT.format(word) for word in digits.class_names]),
                             normalize=True)
    result = {}
    for name, domain in zip(digits.ENVIRONMENTS, digits):
        images, labels = domain.tensors
        image = model.encode_image((images - mean) / std, normalize=True)
        result[name] = ((image @ text.T).argmax(1) == labels).float().mean().item()
    return result


def card(accuracy: dict[str, float], command: str, minutes: float, threads: int,
         size: int, n_weights: int) -> str:
    """The text of tiny_clip.md."""
    rows = "\n".join(f"| {name} | {100 * value:.1f} |" for name, value in accuracy.items())
    return f"""# tiny_clip.safetensors
A CLIP for 32x32 pixels that reads sentences about digits. It stands in for a real one where none
can be downloaded: in tests, in the demo, and as the teacher of RISE and SCMD on DigitsDG. It knows
nothing but digits.

- Architecture: open_clip's own `CLIP`, a ModifiedResNet and a text transformer with a joint space
  of 64 dimensions; {n_weights:,} weights, {size:,} bytes. `tiny_clip.json` holds open_clip's
  `model_cfg` and `preprocess_cfg`, and the vocabulary.
- Text: English about digits, colours, patterns and drawings. The tokens are open_clip's; those
  that occur in no caption share one id.
- Loss: open_clip's `ClipLoss`, from scratch: on a quarter of each batch at once, with captions such
  as "a dark textured picture of a red seven on a striped background", and on the rest in tens, one
  image of each digit under the same prompt. Of RISE's and SCMD's prompts those that say nothing of
  the look are among those; the captions say which look is meant by sketch, textured, dark, etc.
- Data: images that `tools/render_digits.py` draws, a new one each time: strokes through points
  placed by hand, bent, slanted, blurred by passing through 8x8 or 16x16 pixels, filled, outlined or
  hatched, in colours or greys, on flat or patterned grounds. It saw no image of DigitsDG and no
  other dataset. It does know looks *like* DigitsDG's, sketches among them, as a CLIP trained on
  the web does; and accuracy on DigitsDG was looked at while the renderer was written, so what
  stands below is not a blind test.
- Made in {minutes:.0f} minutes on {"a core" if threads == 1 else f"{threads} cores"} by
  `{command}`.
  The same arguments, threads, machine and version of PyTorch give the same weights.
- Licence: the package's own.

Zero-shot accuracy, in %, with "{PROMPT}" on all images of each domain of DigitsDG
(chance: 10):

| domain | accuracy |
| --- | --- |
{rows}
| mean | {100 * sum(accuracy.values()) / len(accuracy):.1f} |
"""


def main(argv: list[str] | None = None) -> int:
    """Trains, saves, measures and writes the card."""
    parser = argparse.ArgumentParser(
        description="Train the tiny CLIP on rendered digits; print zero-shot accuracy on DigitsDG.")
    parser.add_argument("--out", type=Path, default=ASSETS,
                        help="folder to write to (default: the package's assets)")
    parser.add_argument("--seed", type=int, default=0, help="of all random draws (default: 0)")
    parser.add_argument("--steps", type=int, default=2000, help="updates (default: 2000)")
    parser.add_argument("--batch", type=int, default=240,
                        help="images per update, a multiple of 40 (default: 240)")
    parser.add_argument("--lr", type=float, default=2e-3, help="of AdamW (default: 2e-3)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: 1)")
    args = parser.parse_args(argv)
    if args.batch < 40 or args.batch % 40:
        parser.error(f"--batch is {args.batch}; it takes a multiple of 40")

    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    model, settings = train(args.seed, args.steps, args.batch, args.lr)
    minutes = (time.perf_counter() - start) / 60
    args.out.mkdir(parents=True, exist_ok=True)
    save(model, settings, args.out)
    accuracy = evaluate(args.out)
    for name, value in accuracy.items():
        print(f"{name}: {100 * value:.1f} %")
    command = (f"python tools/make_tiny_clip.py --seed {args.seed} --steps {args.steps} "
               f"--batch {args.batch} --lr {args.lr:g} --threads {args.threads}")
    size = (args.out / "tiny_clip.safetensors").stat().st_size
    n_weights = sum(p.numel() for p in model.parameters())
    text = card(accuracy, command, minutes, args.threads, size, n_weights)
    (args.out / "tiny_clip.md").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
