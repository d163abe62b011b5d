"""Datasets held in memory: noise to try code on, the MNIST pair, and the CIFAR pair."""

from domainbed_kd.datasets.base import MultipleDomainDataset, Source

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class _Debug(MultipleDomainDataset):
    ENVIRONMENTS = ["0", "1", "2"]
    CLASSES = DIGITS[:2]
    num_classes = 2

    def __init__(self, root, test_envs, hparams):
        import torch
        from torch.utils.data import TensorDataset

        self.datasets = [
            TensorDataset(torch.randn(16, *self.input_shape), torch.randint(0, 2, (16,)))
            for _ in self.ENVIRONMENTS]


class Debug28(_Debug):
    """28-pixel noise for trying out code; needs no files."""

    SIDE = 28
    input_shape = INPUT_SHAPE = (3, SIDE, SIDE)
    SMALL_IMAGES = True


class Debug224(_Debug):
    """224-pixel noise for trying out code; needs no files."""

    SIDE = 224
    input_shape = INPUT_SHAPE = (3, SIDE, SIDE)


def _both_parts(dataset, kind: type, root, place: str, what: str) -> list:
    """The training and test parts of a torchvision dataset, downloaded if they are missing."""
    root = dataset.folder(root)
    try:
        return [kind(root, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError, ValueError) as error:
        raise FileNotFoundError(
            f"{type(dataset).__name__}: {root / place} does not hold {what}, and fetching them "
            f"failed ({error}). Put them there.") from error


class _MNIST(MultipleDomainDataset):
    """MNIST's 70,000 digits, shuffled and divided among the domains."""

    SIDE = 28
    SMALL_IMAGES = True
    NEEDS_FILES = True
    SOURCE = Source("12 MB", "https (torchvision)", "CC BY-SA 3.0",
                    "https://yann.lecun.com/exdb/mnist/", "MNIST")

    def __init__(self, root, test_envs, hparams):
        import torch
        from torchvision.datasets import MNIST

        parts = _both_parts(self, MNIST, root, "MNIST/raw", "MNIST's four files")
        images = torch.cat([part.data for part in parts])
        labels = torch.cat([part.targets for part in parts])
        order = torch.randperm(len(images))
        n = len(self.ENVIRONMENTS)
        self.datasets = [self.domain(images[order[i::n]], labels[order[i::n]], i)
                         for i in range(n)]


class ColoredMNIST(_MNIST):
    """Is the digit below five? Colour correlates with the label, by domain in sign and strength.

    Arjovsky et al., "Invariant Risk Minimization", 2019, https://arxiv.org/abs/1907.02893; at 28
    pixels, with 25 % of the labels wrong. The label is 1 for digits below five.
    """

    ENVIRONMENTS = ["+90%", "+80%", "-90%"]
    CLASSES = ("digit_of_five_or_more", "digit_below_five")
    input_shape = (2, 28, 28)
    num_classes = 2

    def domain(self, images, digits, i):
        """Domain i of images (N, 28, 28): one of two channels is black."""
        import torch
        from torch.utils.data import TensorDataset

        y = (digits < 5) ^ (torch.rand(len(digits)) < 0.25)
        color = y ^ (torch.rand(len(digits)) < (0.1, 0.2, 0.9)[i])
        x = torch.stack([images, images], dim=1)
        x[torch.arange(len(x)), 1 - color.long()] = 0
        return TensorDataset(x.float() / 255, y.long())


class RotatedMNIST(_MNIST):
    """MNIST at six angles, in degrees.

    Ghifary et al., "Domain Generalization for Object Recognition with Multi-task Autoencoders",
    ICCV 2015, https://arxiv.org/abs/1508.07680.
    """

    ENVIRONMENTS = ["0", "15", "30", "45", "60", "75"]
    CLASSES = DIGITS
    input_shape = (1, 28, 28)
    num_classes = 10

    def domain(self, images, digits, i):
        """Domain i of images (N, 28, 28), rotated."""
        import torch
        from torch.utils.data import TensorDataset
        from torchvision.transforms import InterpolationMode, functional

        angle = int(self.ENVIRONMENTS[i])
        x = torch.stack([
            functional.to_tensor(functional.rotate(
                functional.to_pil_image(image), angle, InterpolationMode.BILINEAR, fill=0))
            for image in images])
        return TensorDataset(x, digits)


class CIFAR(MultipleDomainDataset):
    """CIFAR-100 and CIFAR-10 (Krizhevsky, 2009), 3x32x32 in [0, 1], without shared classes.

    For distillation without images of the teacher's domain, such as MosaicKD's: the student is
    tested on the domain whose classes its teacher knows, and trains on the other's images, whose
    labels have no meaning for it. Testing and validation use a domain's published test images.
    Training images are padded to 40 pixels, cropped and flipped.
    """

    ENVIRONMENTS = ["CIFAR-100", "CIFAR-10"]
    SIDE = 32
    input_shape = (3, SIDE, SIDE)
    num_classes = 100
    SMALL_IMAGES = True
    NEEDS_FILES = True
    SOURCE = Source("340 MB", "https (torchvision)", "not stated",
                    "https://www.cs.toronto.edu/~kriz/cifar.html", "CIFAR100 CIFAR10")

    def __init__(self, root, test_envs, hparams):
        import torch
        from torchvision import transforms as T
        from torchvision.datasets import CIFAR10, CIFAR100

        plain = T.ConvertImageDtype(torch.float32)
        augmented = T.Compose([T.RandomCrop(32, padding=4), T.RandomHorizontalFlip(), plain])
        kinds = ((CIFAR100, "cifar-100-python"), (CIFAR10, "cifar-10-batches-py"))
        self.datasets = [
            _Images(_both_parts(self, kind, root, place, "its files"),
                    augmented if hparams["data_augmentation"] and i not in test_envs else plain,
                    plain)
            for i, (kind, place) in enumerate(kinds)]


class _Images:
    """The images of a training and a test part, in this order, with a transform."""

    def __init__(self, parts: list, transform, plain_transform):
        import torch

        self.images = torch.cat([torch.from_numpy(part.data) for part in parts]).permute(0, 3, 1, 2)
        self.targets = [y for part in parts for y in part.targets]
        self.n_train = len(parts[0].targets)
        self.transform, self.plain_transform = transform, plain_transform

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        return self.transform(self.images[i]), self.targets[i]
