"""Two datasets from the package wilds, which fetches and reads their files."""

from pathlib import Path

from domainbed_kd.datasets.base import MultipleDomainDataset, Source
from domainbed_kd.datasets.images import STATISTICS, image_size, make_transform, statistics, view


class _WILDSDomain:
    """The images of a WILDS dataset at `indices`."""

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
    """A dataset from the package wilds, with a domain per value of a metadata field."""

    INPUT_SHAPE = (3, 224, 224)
    NORMALIZATION = STATISTICS["imagenet"]
    NEEDS_FILES = True
    FIELD = ""

    def __init__(self, root, test_envs, hparams):
        from torchvision import transforms as T

        size = image_size(hparams)
        self.NORMALIZATION = statistics(hparams)
        resize = T.Resize((size, size))
        plain_transform = make_transform([resize], augment=False, hparams=hparams)
        crop = T.RandomResizedCrop(size, scale=(view(hparams, "view_crop"), 1.0))
        augmented = make_transform([resize, crop], augment=True, hparams=hparams)
        root = self.folder(root)
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


class WILDSCamelyon(_WILDS):
    """Tumour detection in slides from five hospitals (Koh et al., ICML 2021)."""

    ENVIRONMENTS = ["hospital_0", "hospital_1", "hospital_2", "hospital_3", "hospital_4"]
    CLASSES = ("normal_tissue", "tumor_tissue")
    FIELD = "hospital"
    SOURCE = Source("10 GB", "https (wilds)", "CC0 1.0", "https://wilds.stanford.edu/datasets/",
                    "camelyon17")

    @staticmethod
    def load(root: Path):
        """Camelyon17 from `root/camelyon17_v1.0`, wilds' name for it."""
        from wilds.datasets.camelyon17_dataset import Camelyon17Dataset

        return Camelyon17Dataset(root_dir=str(root))


class WILDSFMoW(_WILDS):
    """62 uses of land and buildings in satellite images of six regions (Koh et al., ICML 2021)."""

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
    SOURCE = Source("50 GB", "https (wilds)", "FMoW Challenge Public License",
                    "https://wilds.stanford.edu/datasets/", "fmow")

    @staticmethod
    def load(root: Path):
        """FMoW from `root/fmow_v1.1`, wilds' name for it."""
        from wilds.datasets.fmow_dataset import FMoWDataset

        return FMoWDataset(root_dir=str(root))
