"""The data sets: DomainBed's, image folders of one's own, and digits that ship with the package.

Names, order of domains, transforms, folder layouts and frequencies are DomainBed's
(https://github.com/facebookresearch/DomainBed). A data set is a list of domains ("environments");
a domain is a map-style data set of (x, y): float32 (C, H, W) and a class index.
torch is imported when a data set is built, not with this module.
"""

import copy
import os
from collections.abc import Collection
from pathlib import Path

from domainbed_kd.console import did_you_mean

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

DATASETS: list[str] = []
_CLASSES: dict[str, type] = {}


def register(cls: type) -> type:
    """Adds a data set class under its name; usable as a decorator."""
    if cls.__name__ not in DATASETS:
        DATASETS.append(cls.__name__)
    _CLASSES[cls.__name__] = cls
    return cls


def get_dataset_class(name: str, data_dir: str | Path | None = None) -> type:
    """The class of that name; for "Folder:NAME", one that reads `<data_dir>/NAME`.

    The message for an unknown name depends on what is in `data_dir`.

    Raises:
        NotImplementedError: if there is none; the message names the nearest known.
        ValueError: if NAME is not the name of a folder.
    """
    if name.startswith("Folder:"):
        folder = name.removeprefix("Folder:")
        if folder in ("", ".", "..") or "/" in folder or "\\" in folder:
            raise ValueError(f"{name}: after 'Folder:' comes the name of a folder in the data "
                             "directory, without a path.")
        return type(name, (ImageFolders,), {"FOLDER": folder, "__doc__": f"Images in {folder}."})
    if name not in _CLASSES:
        hint = did_you_mean(name, DATASETS)
        if data_dir and name and Path(data_dir, name).is_dir():
            hint = f" To read the images in {Path(data_dir, name)}, say Folder:{name}."
        raise NotImplementedError(
            f"Dataset not found: {name}.{hint} Known: {', '.join(DATASETS)}, and Folder:NAME for "
            "images of your own in DATA_DIR/NAME.")
    return _CLASSES[name]


def environments(name: str, data_dir: str | Path | None = None) -> list[str]:
    """Short labels of a data set's domains, in order; "Folder:NAME" has its folders' names.

    Raises:
        ValueError, FileNotFoundError: if the folder is needed and is not given or not there.
    """
    cls = get_dataset_class(name)
    return list(cls.ENVIRONMENTS or cls.domain_folders(data_dir))


def num_environments(name: str, data_dir: str | Path | None = None) -> int:
    """How many domains a data set has; "Folder:NAME" needs `data_dir`."""
    return len(environments(name, data_dir))


def check_test_envs(name: str, n_envs: int, test_envs: Collection[int]) -> None:
    """Refuses domains to hold out that a data set of so many has not, or all that it has.

    Raises:
        ValueError: naming them.
    """
    asked = f"--test_envs {' '.join(map(str, test_envs))}"
    if not set(test_envs) <= set(range(n_envs)):
        raise ValueError(f"{asked}: {name} has environments 0 to {n_envs - 1}.")
    if len(set(test_envs)) == n_envs:
        raise ValueError(f"{asked} holds out all of {name}: no environment is left to train on.")


def class_names(name: str, data_dir: str | Path | None = None) -> list[str]:
    """A data set's classes as words, in label order; "Folder:NAME" needs `data_dir`."""
    cls = get_dataset_class(name)
    if cls.CLASSES:
        return cls.words(cls.CLASSES)
    first_domain = cls.folder(data_dir) / cls.domain_folders(data_dir)[0]
    return cls.words(_subfolders(first_domain))


def domain_names(name: str) -> list[str] | None:
    """A data set's domains as words, in order; None where their names say nothing of their look."""
    names = get_dataset_class(name).DOMAIN_NAMES
    return None if names is None else list(names)


def plain(dataset):
    """The same images without augmentation, of a domain or of a split of one.

    A shallow copy; where there is no augmentation to leave out, the argument itself.
    """
    if hasattr(dataset, "underlying_dataset"):
        same = copy.copy(dataset)
        same.underlying_dataset = plain(dataset.underlying_dataset)
        return same
    if not hasattr(dataset, "plain_transform"):
        return dataset
    same = copy.copy(dataset)
    same.transform = dataset.plain_transform
    return same


class MultipleDomainDataset:
    """A list of domains.

    A subclass fills `self.datasets`, `self.input_shape` (C, H, W) and `self.num_classes` in
    `__init__(root, test_envs, hparams)`. Its class attributes answer what is asked before the
    images are there.
    """

    #: Updates in a run, and between two evaluations.
    N_STEPS = 5001
    CHECKPOINT_FREQ = 100
    #: Streams of random numbers that a loader simulates, as DomainBed's eight workers have them.
    N_WORKERS = 8
    #: Short labels of the domains, in order.
    ENVIRONMENTS: list[str] | None = None
    #: Where DomainBed states the shape (C, H, W) on the class.
    INPUT_SHAPE: tuple | None = None
    #: The classes' folder names in label order, and words for those that do not speak.
    CLASSES: tuple = ()
    WORDS: dict[str, str] = {}
    #: The domains as words, in order.
    DOMAIN_NAMES: tuple | None = None
    #: (mean, std) per channel that images in [0, 1] were normalized with; None if they were not.
    NORMALIZATION: tuple | None = None

    datasets: list
    input_shape: tuple
    num_classes: int

    @classmethod
    def words(cls, classes) -> list[str]:
        """The words for classes' folder names: "Alarm_Clock" is an "alarm clock"."""
        return [cls.WORDS.get(c, c.replace("_", " ").lower()) for c in classes]

    @property
    def class_names(self) -> list[str] | None:
        """The classes as words, in label order."""
        return self.words(self.CLASSES) or None

    @property
    def domain_names(self) -> list[str] | None:
        """The domains as words, in order; None where their names say nothing of their look."""
        return None if self.DOMAIN_NAMES is None else list(self.DOMAIN_NAMES)

    def __getitem__(self, index):
        return self.datasets[index]

    def __len__(self):
        return len(self.datasets)


class _Debug(MultipleDomainDataset):
    ENVIRONMENTS = ["0", "1", "2"]
    CLASSES = DIGITS[:2]

    def __init__(self, root, test_envs, hparams):
        import torch
        from torch.utils.data import TensorDataset

        self.input_shape = self.INPUT_SHAPE
        self.num_classes = 2
        self.datasets = [
            TensorDataset(torch.randn(16, *self.INPUT_SHAPE), torch.randint(0, 2, (16,)))
            for _ in self.ENVIRONMENTS]


@register
class Debug28(_Debug):
    """Noise of 28 pixels, to try code on; needs no files."""

    INPUT_SHAPE = (3, 28, 28)


@register
class Debug224(_Debug):
    """Noise of 224 pixels, to try code on; needs no files."""

    INPUT_SHAPE = (3, 224, 224)


def _folder(name: str, root) -> Path:
    """`root` as a path.

    Raises:
        ValueError: if it is None.
    """
    if root is None:
        raise ValueError(f"{name}: no data directory is given. Pass --data_dir.")
    return Path(root)


class _MNIST(MultipleDomainDataset):
    """MNIST's 70,000 digits, shuffled and dealt out to the domains."""

    def __init__(self, root, test_envs, hparams):
        import torch
        from torchvision.datasets import MNIST

        root = _folder(type(self).__name__, root)
        try:
            parts = [MNIST(root, train=train, download=True) for train in (True, False)]
        except (OSError, RuntimeError, ValueError) as error:
            raise FileNotFoundError(
                f"{type(self).__name__}: {root / 'MNIST' / 'raw'} does not hold MNIST's four "
                f"files, and fetching them failed ({error}). Put them there.") from error
        images = torch.cat([part.data for part in parts])
        labels = torch.cat([part.targets for part in parts])
        order = torch.randperm(len(images))
        n = len(self.ENVIRONMENTS)
        self.datasets = [self.domain(images[order[i::n]], labels[order[i::n]], i)
                         for i in range(n)]


@register
class ColoredMNIST(_MNIST):
    """Is the digit below five? Colour says so too, with a sign that differs between domains.

    Arjovsky et al., "Invariant Risk Minimization", 2019, https://arxiv.org/abs/1907.02893; at 28
    pixels, with 25 % of the labels wrong. The label is 1 for digits below five.
    """

    ENVIRONMENTS = ["+90%", "+80%", "-90%"]
    CLASSES = ("digit_of_five_or_more", "digit_below_five")

    def __init__(self, root, test_envs, hparams):
        super().__init__(root, test_envs, hparams)
        self.input_shape = (2, 28, 28)
        self.num_classes = 2

    def domain(self, images, digits, i):
        """Domain i of images (N, 28, 28): one of two channels is black."""
        import torch
        from torch.utils.data import TensorDataset

        y = (digits < 5) ^ (torch.rand(len(digits)) < 0.25)
        color = y ^ (torch.rand(len(digits)) < (0.1, 0.2, 0.9)[i])
        x = torch.stack([images, images], dim=1)
        x[torch.arange(len(x)), 1 - color.long()] = 0
        return TensorDataset(x.float() / 255, y.long())


@register
class RotatedMNIST(_MNIST):
    """MNIST at six angles, in degrees.

    Ghifary et al., "Domain Generalization for Object Recognition with Multi-task Autoencoders",
    ICCV 2015, https://arxiv.org/abs/1508.07680.
    """

    ENVIRONMENTS = ["0", "15", "30", "45", "60", "75"]
    CLASSES = DIGITS

    def __init__(self, root, test_envs, hparams):
        super().__init__(root, test_envs, hparams)
        self.input_shape = (1, 28, 28)
        self.num_classes = 10

    def domain(self, images, digits, i):
        """Domain i of images (N, 28, 28): turned."""
        import torch
        from torch.utils.data import TensorDataset
        from torchvision.transforms import InterpolationMode, functional

        angle = int(self.ENVIRONMENTS[i])
        x = torch.stack([
            functional.to_tensor(functional.rotate(
                functional.to_pil_image(image), angle, InterpolationMode.BILINEAR, fill=0))
            for image in images])
        return TensorDataset(x, digits)


def load_image(path: str, whole: bool = False):
    """The image as RGB; a truncated file gives what there is of it, as in DomainBed.

    Args:
        path: of the file.
        whole: refuse a truncated one; not while another thread wants the other.

    Raises:
        FileNotFoundError: if the file has been taken away since the folder was listed.
        OSError: if the system does not let it be read.
        ValueError: if the file is not an image, or not all of one.
    """
    from PIL import Image, ImageFile

    ImageFile.LOAD_TRUNCATED_IMAGES = not whole
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is not there any more. Put the images back: the same "
                                "command goes on from the run's last state.") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.errno:  # the system's, not Pillow's
            error.filename = str(path)
            raise
        raise ValueError(f"{path} cannot be read as an image. Replace it.") from error


def _image_size(hparams) -> int:
    """Side in pixels of a data set's images.

    Raises:
        ValueError: if the hparam is not a positive whole number.
    """
    size = hparams.get("image_size", 224)
    if type(size) is not int or size < 1:
        raise ValueError(f"hparams['image_size'] is {size!r}; it must be a side in whole pixels, "
                         "such as 224.")
    return size


def _transform(first: list, augment: bool):
    """Resizing or cropping, DomainBed's augmentation if asked for, ImageNet's normalization."""
    from torchvision import transforms as T

    distortions = [T.RandomHorizontalFlip(), T.ColorJitter(0.3, 0.3, 0.3, 0.3),
                   T.RandomGrayscale()] if augment else []
    transform = T.Compose(
        [*first, *distortions, T.ToTensor(), T.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
    if augment:
        transform.geometry = first  # fast mode does the rest otherwise
    return transform


def _subfolders(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


class ImageFolders(MultipleDomainDataset):
    """Images in `<data_dir>/FOLDER/<domain>/<class>/`, domains and classes in the order of names.

    Side in pixels: `hparams["image_size"]`, 224 if absent. Training domains are augmented if
    `hparams["data_augmentation"]` says so.

    Raises:
        FileNotFoundError: if the folder, its domains or its images are not there.
        ValueError: if domains are missing or have different classes.
    """

    CHECKPOINT_FREQ = 300
    NORMALIZATION = (IMAGENET_MEAN, IMAGENET_STD)
    FOLDER = ""

    def __init__(self, root, test_envs, hparams):
        from torchvision import transforms as T
        from torchvision.datasets import ImageFolder

        size = _image_size(hparams)
        plain_transform = _transform([T.Resize((size, size))], augment=False)
        augmented = _transform([T.RandomResizedCrop(size, scale=(0.7, 1.0))], augment=True)
        self.input_shape = (3, size, size)
        self.datasets = []
        folders = self.domain_folders(root)
        self._check_domains(self.folder(root), folders)
        for i, name in enumerate(folders):
            augment = hparams["data_augmentation"] and i not in test_envs
            domain = ImageFolder(
                self.folder(root) / name, augmented if augment else plain_transform,
                loader=load_image, allow_empty=True)
            domain.plain_transform = plain_transform
            self._check_images(domain)
            self.datasets.append(domain)
        self.num_classes = len(domain.classes)
        self.ENVIRONMENTS = self.ENVIRONMENTS or folders

    @property
    def class_names(self) -> list[str]:
        """The classes as words, in label order."""
        return self.words(self.datasets[-1].classes)

    @classmethod
    def folder(cls, data_dir) -> Path:
        """The data set's folder in `data_dir`."""
        return _folder(cls.__name__, data_dir) / cls.FOLDER

    @classmethod
    def domain_folders(cls, data_dir) -> list[str]:
        """The names of the domains' folders, in order; hidden ones are left out.

        Raises:
            FileNotFoundError: if there is none, or none has folders of classes.
        """
        folder = cls.folder(data_dir)
        names = _subfolders(folder) if folder.is_dir() else []
        if not names:
            problem = "holds no domains" if folder.is_dir() else "is not there"
            raise FileNotFoundError(
                f"{cls.__name__}: {folder} {problem}. Images belong in {folder}/<domain>/<class>/; "
                "python -m domainbed_kd.scripts.download says what it can fetch.")
        if not any(_subfolders(folder / name) for name in names):
            raise FileNotFoundError(
                f"{cls.__name__}: {folder} holds folders ({', '.join(names[:3])}"
                f"{', ...' if names[3:] else ''}) without folders in them, where domains with "
                f"classes should be. Images belong in {folder}/<domain>/<class>/.")
        return names

    def _check_domains(self, folder: Path, names: list[str]) -> None:
        expected = self.ENVIRONMENTS
        if expected and len(names) != len(expected):
            raise ValueError(
                f"{type(self).__name__}: {folder} holds {len(names)} domains ({', '.join(names)}) "
                f"instead of {len(expected)} ({', '.join(expected)}). Complete it, or move what "
                "does not belong there.")
        first = _subfolders(folder / names[0])
        for name in names:
            classes = _subfolders(folder / name)
            if not classes:
                raise FileNotFoundError(f"{type(self).__name__}: {folder / name} holds no class "
                                        f"folders. Images belong in {folder / name}/<class>/.")
            for only, here, there in ((set(classes) - set(first), name, names[0]),
                                      (set(first) - set(classes), names[0], name)):
                if only:
                    raise ValueError(
                        f"{type(self).__name__}: {folder / here} has classes that "
                        f"{folder / there} has not: {', '.join(sorted(only))}. Domains must have "
                        "the same classes: add images, or remove the class everywhere.")

    def _check_images(self, domain) -> None:
        empty = sorted(set(range(len(domain.classes))) - set(domain.targets))
        if empty:
            folder = Path(domain.root, domain.classes[empty[0]])
            os.listdir(folder)  # torchvision passes over what may not be read
            raise FileNotFoundError(
                f"{type(self).__name__}: {folder} holds no images. Add some, or remove the class "
                "everywhere.")


@register
class VLCS(ImageFolders):
    """Five classes in photographs of four collections (Fang et al., ICCV 2013)."""

    FOLDER = "VLCS"
    ENVIRONMENTS = ["C", "L", "S", "V"]
    CLASSES = ("bird", "car", "chair", "dog", "person")


@register
class PACS(ImageFolders):
    """Seven classes in four styles (Li et al., ICCV 2017)."""

    FOLDER = "PACS"
    ENVIRONMENTS = ["A", "C", "P", "S"]
    CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
    DOMAIN_NAMES = ("art painting", "cartoon", "photo", "sketch")


@register
class OfficeHome(ImageFolders):
    """65 everyday objects in four styles (Venkateswara et al., CVPR 2017)."""

    FOLDER = "office_home"
    ENVIRONMENTS = ["A", "C", "P", "R"]
    CLASSES = tuple("""
        Alarm_Clock Backpack Batteries Bed Bike Bottle Bucket Calculator Calendar Candles Chair
        Clipboards Computer Couch Curtains Desk_Lamp Drill Eraser Exit_Sign Fan File_Cabinet
        Flipflops Flowers Folder Fork Glasses Hammer Helmet Kettle Keyboard Knives Lamp_Shade
        Laptop Marker Monitor Mop Mouse Mug Notebook Oven Pan Paper_Clip Pen Pencil Postit_Notes
        Printer Push_Pin Radio Refrigerator Ruler Scissors Screwdriver Shelf Sink Sneakers Soda
        Speaker Spoon TV Table Telephone ToothBrush Toys Trash_Can Webcam""".split())
    WORDS = {"Flipflops": "flip-flops", "Postit_Notes": "post-it notes", "TV": "television"}
    DOMAIN_NAMES = ("art", "clipart", "product", "real world")


@register
class TerraIncognita(ImageFolders):
    """Ten kinds of animals in the pictures of four camera traps (Beery et al., ECCV 2018)."""

    FOLDER = "terra_incognita"
    ENVIRONMENTS = ["L100", "L38", "L43", "L46"]
    CLASSES = ("bird", "bobcat", "cat", "coyote", "dog", "empty", "opossum", "rabbit", "raccoon",
               "squirrel")
    WORDS = {"empty": "empty scene"}


@register
class DomainNet(ImageFolders):
    """345 classes in six styles (Peng et al., ICCV 2019)."""

    CHECKPOINT_FREQ = 1000
    FOLDER = "domain_net"
    ENVIRONMENTS = ["clip", "info", "paint", "quick", "real", "sketch"]
    CLASSES = tuple("""
        The_Eiffel_Tower The_Great_Wall_of_China The_Mona_Lisa aircraft_carrier airplane
        alarm_clock ambulance angel animal_migration ant anvil apple arm asparagus axe backpack
        banana bandage barn baseball baseball_bat basket basketball bat bathtub beach bear beard
        bed bee belt bench bicycle binoculars bird birthday_cake blackberry blueberry book
        boomerang bottlecap bowtie bracelet brain bread bridge broccoli broom bucket bulldozer bus
        bush butterfly cactus cake calculator calendar camel camera camouflage campfire candle
        cannon canoe car carrot castle cat ceiling_fan cell_phone cello chair chandelier church
        circle clarinet clock cloud coffee_cup compass computer cookie cooler couch cow crab
        crayon crocodile crown cruise_ship cup diamond dishwasher diving_board dog dolphin donut
        door dragon dresser drill drums duck dumbbell ear elbow elephant envelope eraser eye
        eyeglasses face fan feather fence finger fire_hydrant fireplace firetruck fish flamingo
        flashlight flip_flops floor_lamp flower flying_saucer foot fork frog frying_pan garden
        garden_hose giraffe goatee golf_club grapes grass guitar hamburger hammer hand harp hat
        headphones hedgehog helicopter helmet hexagon hockey_puck hockey_stick horse hospital
        hot_air_balloon hot_dog hot_tub hourglass house house_plant hurricane ice_cream jacket
        jail kangaroo key keyboard knee knife ladder lantern laptop leaf leg light_bulb lighter
        lighthouse lightning line lion lipstick lobster lollipop mailbox map marker matches
        megaphone mermaid microphone microwave monkey moon mosquito motorbike mountain mouse
        moustache mouth mug mushroom nail necklace nose ocean octagon octopus onion oven owl
        paint_can paintbrush palm_tree panda pants paper_clip parachute parrot passport peanut
        pear peas pencil penguin piano pickup_truck picture_frame pig pillow pineapple pizza
        pliers police_car pond pool popsicle postcard potato power_outlet purse rabbit raccoon
        radio rain rainbow rake remote_control rhinoceros rifle river roller_coaster rollerskates
        sailboat sandwich saw saxophone school_bus scissors scorpion screwdriver sea_turtle
        see_saw shark sheep shoe shorts shovel sink skateboard skull skyscraper sleeping_bag
        smiley_face snail snake snorkel snowflake snowman soccer_ball sock speedboat spider spoon
        spreadsheet square squiggle squirrel stairs star steak stereo stethoscope stitches
        stop_sign stove strawberry streetlight string_bean submarine suitcase sun swan sweater
        swing_set sword syringe t-shirt table teapot teddy-bear telephone television
        tennis_racquet tent tiger toaster toe toilet tooth toothbrush toothpaste tornado tractor
        traffic_light train tree triangle trombone truck trumpet umbrella underwear van vase
        violin washing_machine watermelon waterslide whale wheel windmill wine_bottle wine_glass
        wristwatch yoga zebra zigzag""".split())
    WORDS = {"teddy-bear": "teddy bear", "The_Eiffel_Tower": "the Eiffel Tower",
             "The_Great_Wall_of_China": "the Great Wall of China",
             "The_Mona_Lisa": "the Mona Lisa"}
    DOMAIN_NAMES = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")


@register
class SVIRO(ImageFolders):
    """Rear seats of ten cars, rendered: who sits there? (Cruz et al., WACV 2020)."""

    FOLDER = "sviro"
    ENVIRONMENTS = ["aclass", "escape", "hilux", "i3", "lexus", "tesla", "tiguan", "tucson", "x5",
                    "zoe"]
    CLASSES = tuple("0123456")
    WORDS = {"0": "empty seat", "1": "infant in an infant seat", "2": "child in a child seat",
             "3": "adult passenger", "4": "everyday object", "5": "empty infant seat",
             "6": "empty child seat"}


class _WILDSDomain:
    """The images of a WILDS data set at `indices`."""

    def __init__(self, dataset, indices: list[int], transform, plain_transform):
        self.dataset = dataset
        self.indices = indices
        self.transform = transform
        self.plain_transform = plain_transform

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        index = self.indices[i]
        image = self.dataset.get_input(index).convert("RGB")
        return self.transform(image), int(self.dataset.y_array[index])


class _WILDS(MultipleDomainDataset):
    """A data set of the package wilds, one domain per value of a metadata field."""

    INPUT_SHAPE = (3, 224, 224)
    NORMALIZATION = (IMAGENET_MEAN, IMAGENET_STD)
    FIELD = ""

    def __init__(self, root, test_envs, hparams):
        from torchvision import transforms as T

        size = _image_size(hparams)
        resize = T.Resize((size, size))
        plain_transform = _transform([resize], augment=False)
        augmented = _transform(
            [resize, T.RandomResizedCrop(size, scale=(0.7, 1.0))], augment=True)
        root = _folder(type(self).__name__, root)
        try:
            dataset = self.load(root)
        except ImportError as error:
            raise ValueError(f"{type(self).__name__} needs the package wilds ({error}). "
                             "Run: pip install domainbed_kd[wilds]") from error
        values = dataset.metadata_array[:, dataset.metadata_fields.index(self.FIELD)]
        self.datasets = []
        for i, value in enumerate(values.unique(sorted=True)):
            augment = hparams["data_augmentation"] and i not in test_envs
            indices = (values == value).nonzero().flatten().tolist()
            self.datasets.append(_WILDSDomain(
                dataset, indices, augmented if augment else plain_transform, plain_transform))
        self.input_shape = (3, size, size)
        self.num_classes = dataset.n_classes


@register
class WILDSCamelyon(_WILDS):
    """Is there a tumour in the slide? Five hospitals (Koh et al., ICML 2021)."""

    ENVIRONMENTS = ["hospital_0", "hospital_1", "hospital_2", "hospital_3", "hospital_4"]
    CLASSES = ("normal_tissue", "tumor_tissue")
    FIELD = "hospital"

    @staticmethod
    def load(root: Path):
        """Camelyon17 in `root/camelyon17_v1.0`, as wilds names it."""
        from wilds.datasets.camelyon17_dataset import Camelyon17Dataset

        return Camelyon17Dataset(root_dir=str(root))


@register
class WILDSFMoW(_WILDS):
    """62 uses of land and buildings seen from above, in six regions (Koh et al., ICML 2021)."""

    ENVIRONMENTS = ["region_0", "region_1", "region_2", "region_3", "region_4", "region_5"]
    CLASSES = tuple("""
        airport airport_hangar airport_terminal amusement_park aquaculture archaeological_site
        barn border_checkpoint burial_site car_dealership construction_site crop_field dam
        debris_or_rubble educational_institution electric_substation factory_or_powerplant
        fire_station flooded_road fountain gas_station golf_course ground_transportation_station
        helipad hospital impoverished_settlement interchange lake_or_pond lighthouse
        military_facility multi-unit_residential nuclear_powerplant office_building
        oil_or_gas_facility park parking_lot_or_garage place_of_worship police_station port prison
        race_track railway_bridge recreational_facility road_bridge runway shipyard shopping_mall
        single-unit_residential smokestack solar_farm space_facility stadium storage_tank
        surface_mine swimming_pool toll_booth tower tunnel_opening waste_disposal
        water_treatment_facility wind_farm zoo""".split())
    FIELD = "region"

    @staticmethod
    def load(root: Path):
        """FMoW in `root/fmow_v1.1`, as wilds names it."""
        from wilds.datasets.fmow_dataset import FMoWDataset

        return FMoWDataset(root_dir=str(root))


class ImageList:
    """Images by (path, label), with the attributes of torchvision's ImageFolder."""

    loader = staticmethod(load_image)

    def __init__(self, samples: list[tuple[str, int]], classes, transform, plain_transform):
        self.samples = samples
        self.targets = [y for _, y in samples]
        self.classes = list(classes)
        self.class_to_idx = {c: y for y, c in enumerate(classes)}
        self.transform = transform
        self.plain_transform = plain_transform

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        path, y = self.samples[i]
        return self.transform(self.loader(path)), y


class _Spawrious(MultipleDomainDataset):
    """Four breeds of dogs, on backgrounds that change place between training and test.

    Lynch et al., "Spawrious", 2023, https://arxiv.org/abs/2303.05470. Images are read from
    `<data_dir>/{0|1}/<background>/<breed>/`. The first domain is the test, whatever `test_envs`
    says. Files are taken in the order of their names; DomainBed takes them as the disk lists them.
    """

    ENVIRONMENTS = ["Test", "SC_group_1", "SC_group_2"]
    CLASSES = ("bulldog", "corgi", "dachshund", "labrador")
    NORMALIZATION = (IMAGENET_MEAN, IMAGENET_STD)
    #: The order in which backgrounds are listed below.
    BREEDS = ("bulldog", "dachshund", "labrador", "corgi")
    N_IMAGES = 3168
    #: Backgrounds by breed in training and test, and the one that all breeds share in training.
    TRAIN: tuple = ()
    TEST: tuple = ()
    FILLER = ""

    def __init__(self, root, test_envs, hparams):
        from torchvision import transforms as T

        size = _image_size(hparams)
        resize = T.Resize((size, size))
        plain_transform = _transform([resize], augment=False)
        training_transform = _transform([resize], augment=hparams["data_augmentation"])
        root = _folder(type(self).__name__, root)
        self.datasets = [ImageList(
            self._test_group(root, 0) + self._test_group(root, 1), self.CLASSES,
            plain_transform, plain_transform)]
        self.datasets += [ImageList(
            self._training_group(root, group), self.CLASSES, training_transform, plain_transform)
            for group in (0, 1)]
        self.input_shape = (3, size, size)
        self.num_classes = len(self.CLASSES)

    def _samples(self, root: Path, folder: int, background: str, breed: str,
                 limit: int | None = None) -> list[tuple[str, int]]:
        path = root / str(folder) / background / breed
        files = sorted(path.iterdir()) if path.is_dir() else []
        images = [str(f) for f in files if f.suffix in (".png", ".jpg", ".jpeg")]
        if not images:
            raise FileNotFoundError(
                f"{type(self).__name__}: there are no images in {path}. Spawrious belongs in "
                f"{root}/0/<background>/<breed>/ and {root}/1/...; "
                "python -m domainbed_kd.scripts.download says where it comes from.")
        return [(image, self.CLASSES.index(breed)) for image in images[:limit]]

    def _group(self, root: Path, backgrounds: tuple, group: int, limit: int | None = None) -> list:
        """One background per breed; many-to-many swaps neighbours in the second group."""
        samples = []
        for k, breed in enumerate(self.BREEDS):
            if self.FILLER:
                samples += self._samples(root, group, backgrounds[k], breed, limit)
            else:
                samples += self._samples(root, 0, backgrounds[k ^ group], breed, limit)
        return samples

    def _test_group(self, root: Path, group: int) -> list:
        return self._group(root, self.TEST, group)

    def _training_group(self, root: Path, group: int) -> list:
        if not self.FILLER:
            return self._group(root, self.TRAIN, group, self.N_IMAGES)
        correlated = int((0.97, 0.87)[group] * self.N_IMAGES)
        samples = self._group(root, self.TRAIN, group, correlated)
        for breed in self.BREEDS:
            samples += self._samples(
                root, group, self.FILLER, breed, self.N_IMAGES - correlated)
        return samples


@register
class SpawriousO2O_easy(_Spawrious):
    """One background per breed, and others in the test."""

    TRAIN = ("desert", "jungle", "dirt", "snow")
    TEST = ("dirt", "snow", "desert", "jungle")
    FILLER = "beach"


@register
class SpawriousO2O_medium(_Spawrious):
    """One background per breed, and others in the test."""

    TRAIN = ("mountain", "beach", "dirt", "jungle")
    TEST = ("jungle", "dirt", "beach", "snow")
    FILLER = "desert"


@register
class SpawriousO2O_hard(_Spawrious):
    """One background per breed, and others in the test."""

    TRAIN = ("jungle", "mountain", "snow", "desert")
    TEST = ("mountain", "snow", "desert", "jungle")
    FILLER = "beach"


@register
class SpawriousM2M_easy(_Spawrious):
    """Two breeds share two backgrounds, and two others in the test."""

    TRAIN = ("desert", "mountain", "dirt", "jungle")
    TEST = ("dirt", "jungle", "mountain", "desert")


@register
class SpawriousM2M_medium(_Spawrious):
    """Two breeds share two backgrounds, and two others in the test."""

    TRAIN = ("beach", "snow", "mountain", "desert")
    TEST = ("desert", "mountain", "beach", "snow")


@register
class SpawriousM2M_hard(_Spawrious):
    """Two breeds share two backgrounds, and two others in the test."""

    TRAIN = ("dirt", "jungle", "snow", "beach")
    TEST = ("snow", "beach", "dirt", "jungle")


@register
class DigitsDG(MultipleDomainDataset):
    """1,797 real handwritten digits in four looks, 3x32x32 in [0, 1]; ships with the package.

    No digit occurs in two domains. See assets/digits.md for the source, digits.py for the looks.
    """

    ENVIRONMENTS = ["plain", "colour", "texture", "sketch"]
    CLASSES = DIGITS
    DOMAIN_NAMES = ("plain drawing", "colourful drawing", "textured picture", "sketch")
    INPUT_SHAPE = (3, 32, 32)

    def __init__(self, root, test_envs, hparams):
        import torch
        from torch.utils.data import TensorDataset

        from domainbed_kd.datasets import digits

        self.input_shape = self.INPUT_SHAPE
        self.num_classes = 10
        self.datasets = [
            TensorDataset(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255,
                          torch.from_numpy(labels))
            for images, labels in digits.domains()]
