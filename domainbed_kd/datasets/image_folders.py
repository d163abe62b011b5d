"""Datasets in image folders: DomainBed's, and a user's own."""

import os
from pathlib import Path

from domainbed_kd.datasets.base import MultipleDomainDataset, Source
from domainbed_kd.datasets.images import (
    STATISTICS,
    image_size,
    load_image,
    make_transform,
    statistics,
    view,
)


def subfolders(path: Path) -> list[str]:
    """The names of a folder's subfolders, sorted, without hidden ones; empty if there is none."""
    found = path.iterdir() if path.is_dir() else ()
    return sorted(p.name for p in found if p.is_dir() and not p.name.startswith("."))


class ImageFolders(MultipleDomainDataset):
    """Images in `<data_dir>/FOLDER/<domain>/<class>/`, domains and classes sorted by name.

    `hparams["image_size"]` is the side in pixels, 224 by default. Training domains are augmented
    if `hparams["data_augmentation"]` is true. Files hold 8 bits per channel, or 16 bits of grey,
    which are scaled. EXIF rotation is not applied, as in DomainBed.

    Raises:
        FileNotFoundError: if the folder, its domains or its images are missing.
        ValueError: if domains are missing or have different classes.
    """

    CHECKPOINT_FREQ = 300
    NORMALIZATION = STATISTICS["imagenet"]
    NEEDS_FILES = True

    def __init__(self, root, test_envs, hparams):
        from torchvision import transforms as T
        from torchvision.datasets import ImageFolder

        size = image_size(hparams)
        self.NORMALIZATION = statistics(hparams)
        plain_transform = make_transform([T.Resize((size, size))], augment=False, hparams=hparams)
        crop = T.RandomResizedCrop(size, scale=(view(hparams, "view_crop"), 1.0))
        augmented = make_transform([crop], augment=True, hparams=hparams)
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
    def domain_folders(cls, data_dir) -> list[str]:
        """The names of the domains' folders, in order; hidden ones are left out."""
        folder = cls.folder(data_dir)
        names = subfolders(folder)
        if not names:
            problem = "holds no domains" if folder.is_dir() else "is not there"
            raise FileNotFoundError(
                f"{cls.__name__}: {folder} {problem}. Images belong in {folder}/<domain>/<class>/; "
                "python -m domainbed_kd.scripts.download says what it can fetch.")
        if not any(subfolders(folder / name) for name in names):
            raise FileNotFoundError(
                f"{cls.__name__}: {folder} holds folders ({', '.join(names[:3])}"
                f"{', ...' if names[3:] else ''}) without folders in them, where domains with "
                f"classes should be. Images belong in {folder}/<domain>/<class>/.")
        return names

    @classmethod
    def read_classes(cls, data_dir) -> list[str]:
        """The classes' folder names, in label order, from the first domain's folder."""
        return subfolders(cls.folder(data_dir) / cls.domain_folders(data_dir)[0])

    def _check_domains(self, folder: Path, names: list[str]) -> None:
        expected = self.ENVIRONMENTS
        if expected and len(names) != len(expected):
            raise ValueError(
                f"{type(self).__name__}: {folder} holds {len(names)} domains ({', '.join(names)}) "
                f"instead of {len(expected)} ({', '.join(expected)}). Complete it, or move what "
                "does not belong there.")
        first = subfolders(folder / names[0])
        for name in names:
            classes = subfolders(folder / name)
            if not classes:
                raise FileNotFoundError(f"{type(self).__name__}: {folder / name} holds no class "
                                        f"folders. Images belong in {folder / name}/<class>/.")
            for only, here, there in ((set(classes) - set(first), name, names[0]),
                                      (set(first) - set(classes), names[0], name)):
                if only:
                    raise ValueError(
                        f"{type(self).__name__}: {folder / here} has classes that "
                        f"{folder / there} lacks: {', '.join(sorted(only))}. Domains must have "
                        "the same classes: add images, or remove the class everywhere.")

    def _check_images(self, domain) -> None:
        empty = sorted(set(range(len(domain.classes))) - set(domain.targets))
        if empty:
            folder = Path(domain.root, domain.classes[empty[0]])
            os.listdir(folder)  # raises for an unreadable folder, which torchvision skips
            raise FileNotFoundError(
                f"{type(self).__name__}: {folder} holds no images. Add some, or remove the class "
                "everywhere.")


class VLCS(ImageFolders):
    """Five classes in photographs from four collections (Fang et al., ICCV 2013)."""

    FOLDER = "VLCS"
    ENVIRONMENTS = ["C", "L", "S", "V"]
    CLASSES = ("bird", "car", "chair", "dog", "person")
    PUBLISHED = {"Caltech101": 1415, "LabelMe": 2656, "SUN09": 3282, "VOC2007": 3376}
    SOURCE = Source("size unknown", "Google Drive (gdown)", "those of its four collections",
                    "https://github.com/belaalb/G2DM", "1skwblH1_okBwxWxmRsp9_qi15hyPpxg8",
                    "VLCS.tar.gz", "VLCS")


class PACS(ImageFolders):
    """Seven classes in four styles (Li et al., ICCV 2017)."""

    FOLDER = "PACS"
    ENVIRONMENTS = ["A", "C", "P", "S"]
    CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
    DOMAIN_NAMES = ("art painting", "cartoon", "photo", "sketch")
    PUBLISHED = {"art_painting": (379, 255, 285, 184, 201, 295, 449),
                 "cartoon": (389, 457, 346, 135, 324, 288, 405),
                 "photo": (189, 202, 182, 186, 199, 280, 432),
                 "sketch": (772, 740, 753, 608, 816, 80, 160)}
    SOURCE = Source("0.2 GB", "Google Drive (gdown)", "none stated",
                    "https://dali-dl.github.io/project_iccv2017.html",
                    "1JFr8f805nMUelQWWmfnJR3y4_SYoN5Pd", "PACS.zip", "kfold")


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
    PUBLISHED = {"Art": 2427, "Clipart": 4365, "Product": 4439, "Real World": 4357}
    SOURCE = Source("1 GB", "Google Drive (gdown)", "research only",
                    "https://www.hemanthdv.org/officeHomeDataset.html",
                    "1uY0pj7oFsjMxRwaD3Sxy0jgel0fsYXLC", "office_home.zip",
                    "OfficeHomeDataset_10072016")


class TerraIncognita(ImageFolders):
    """Ten classes in pictures from four camera traps (Beery et al., ECCV 2018)."""

    FOLDER = "terra_incognita"
    ENVIRONMENTS = ["L100", "L38", "L43", "L46"]
    CLASSES = ("bird", "bobcat", "cat", "coyote", "dog", "empty", "opossum", "rabbit", "raccoon",
               "squirrel")
    WORDS = {"empty": "empty scene"}
    PUBLISHED = {"location_100": 4741, "location_38": 9736, "location_43": 3970,
                 "location_46": 5883}
    SOURCE = Source("6 GB", "https", "CDLA-Permissive 1.0",
                    "https://lila.science/datasets/caltech-camera-traps")


class DomainNet(ImageFolders):
    """345 classes in six styles (Peng et al., ICCV 2019)."""

    CHECKPOINT_FREQ = 1000
    MAX_LOG2_BATCH = 5
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
    PUBLISHED = {"clipart": 48129, "infograph": 51605, "painting": 72266, "quickdraw": 172500,
                 "real": 172947, "sketch": 69128}
    SOURCE = Source(
        "18 GB", "by hand", "research only", "https://ai.bu.edu/M3SDA/", layout="<domain>/<class>/",
        note="Take the cleaned version, and of each domain keep only the images that the page's "
             "lists train and test name: 586,575 in all. Then run this with --verify.")


class SVIRO(ImageFolders):
    """Rear seats of ten cars, rendered: who sits there? (Cruz et al., WACV 2020)."""

    FOLDER = "sviro"
    ENVIRONMENTS = ["aclass", "escape", "hilux", "i3", "lexus", "tesla", "tiguan", "tucson", "x5",
                    "zoe"]
    CLASSES = tuple("0123456")
    WORDS = {"0": "empty seat", "1": "infant in an infant seat", "2": "child in a child seat",
             "3": "adult passenger", "4": "everyday object", "5": "empty infant seat",
             "6": "empty child seat"}
    SOURCE = Source("size unknown", "by hand", "CC BY-NC-SA 4.0", "https://sviro.kl.dfki.de",
                    layout="<car>/<class>/",
                    note="It is the folder SVIRO_DOMAINBED of the archive for DomainBed.")
