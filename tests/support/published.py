"""Small data in the very files that datasets are published in, and facts of the whole datasets."""

import gzip
import io
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

# Omniglot: characters of each alphabet, from its authors' description.
BACKGROUND = {
    "Alphabet_of_the_Magi": 20,
    "Anglo-Saxon_Futhorc": 29,
    "Arcadian": 26,
    "Armenian": 41,
    "Asomtavruli_(Georgian)": 40,
    "Balinese": 24,
    "Bengali": 46,
    "Blackfoot_(Canadian_Aboriginal_Syllabics)": 14,
    "Braille": 26,
    "Burmese_(Myanmar)": 34,
    "Cyrillic": 33,
    "Early_Aramaic": 22,
    "Futurama": 26,
    "Grantha": 43,
    "Greek": 24,
    "Gujarati": 48,
    "Hebrew": 22,
    "Inuktitut_(Canadian_Aboriginal_Syllabics)": 16,
    "Japanese_(hiragana)": 52,
    "Japanese_(katakana)": 47,
    "Korean": 40,
    "Latin": 26,
    "Malay_(Jawi_-_Arabic)": 40,
    "Mkhedruli_(Georgian)": 41,
    "N_Ko": 33,
    "Ojibwe_(Canadian_Aboriginal_Syllabics)": 14,
    "Sanskrit": 42,
    "Syriac_(Estrangelo)": 23,
    "Tagalog": 17,
    "Tifinagh": 55,
}
EVALUATION = {
    "Angelic": 20,
    "Atemayar_Qelisayer": 26,
    "Atlantean": 26,
    "Aurek-Besh": 26,
    "Avesta": 26,
    "Ge_ez": 26,
    "Glagolitic": 45,
    "Gurmukhi": 45,
    "Kannada": 41,
    "Keble": 26,
    "Malayalam": 47,
    "Manipuri": 40,
    "Mongolian": 30,
    "Old_Church_Slavonic_(Cyrillic)": 45,
    "Oriya": 46,
    "Sylheti": 28,
    "Syriac_(Serto)": 23,
    "Tengwar": 25,
    "Tibetan": 42,
    "ULOG": 26,
}
OMNIGLOT = [
    f"{alphabet}/character{number + 1:02}"
    for alphabet, characters in {**BACKGROUND, **EVALUATION}.items()
    for number in range(characters)
]

# CIFAR-100's classes by superclass, both in the order of their labels.
CIFAR = {
    "aquatic_mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food_containers": "bottle bowl can cup plate",
    "fruit_and_vegetables": "apple mushroom orange pear sweet_pepper",
    "household_electrical_devices": "clock keyboard lamp telephone television",
    "household_furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large_carnivores": "bear leopard lion tiger wolf",
    "large_man-made_outdoor_things": "bridge castle house road skyscraper",
    "large_natural_outdoor_scenes": "cloud forest mountain plain sea",
    "large_omnivores_and_herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium_mammals": "fox porcupine possum raccoon skunk",
    "non-insect_invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small_mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles_1": "bicycle bus motorcycle pickup_truck train",
    "vehicles_2": "lawn_mower rocket streetcar tank tractor",
}
SUPERCLASS = {name: group for group, names in CIFAR.items() for name in names.split()}
FINE = sorted(SUPERCLASS)
CIFAR_CLASSES = sorted(f"{group}/{name}" for name, group in SUPERCLASS.items())


def noise(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind)
    return content.getvalue()


def omniglot_zip(root: Path, part: str, alphabets: dict[str, int], drawers: int = 2) -> Path:
    """A part of Omniglot: one-bit images in `part/alphabet/character/0001_01.png`."""
    root.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(root / f"{part}.zip", "w") as archive:
        archive.mkdir(f"{part}/")
        for alphabet, characters in alphabets.items():
            for number in range(characters):
                for drawer in range(drawers):
                    ink = noise(number * drawers + drawer, (105, 105)) < 240
                    name = f"{part}/{alphabet}/character{number + 1:02}/{drawer + 1:04}_01.png"
                    archive.writestr(name, encoded(ink))
    return root / f"{part}.zip"


def idx(content: np.ndarray) -> bytes:
    """An IDX file of bytes: two zeros, type 8, dimensions, sizes big-endian, content."""
    sizes = struct.pack(f">{content.ndim}I", *content.shape)
    return bytes((0, 0, 8, content.ndim)) + sizes + content.tobytes()


def write_idx_set(
    folder: Path,
    labels: dict[str, np.ndarray],
    *,
    prefix: str = "",
    gzipped: bool = True,
    size: tuple[int, int] = (28, 28),
) -> dict[str, np.ndarray]:
    """Write images for the labels of `train` and `t10k` (or `test`); return the images."""
    folder.mkdir(parents=True, exist_ok=True)
    images = {}
    for seed, (part, of_part) in enumerate(labels.items()):
        images[part] = noise(seed, (len(of_part), *size))
        for name, content in (
            ("images-idx3-ubyte", images[part]),
            ("labels-idx1-ubyte", of_part.astype(np.uint8)),
        ):
            path = folder / f"{prefix}{part}-{name}"
            if gzipped:
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(idx(content)))
            else:
                path.write_bytes(idx(content))
    return images


def cifar_files(per_class: dict[str, int]) -> dict[str, bytes]:
    """CIFAR-100's four files with so many images of each class in train.bin and test.bin."""
    files = {
        "coarse_label_names.txt": "\n".join([*CIFAR, ""]).encode(),
        "fine_label_names.txt": "\n".join([*FINE, ""]).encode(),
    }
    groups = list(CIFAR)
    for seed, (name, images) in enumerate(per_class.items()):
        pixels = noise(seed, (images, len(FINE), 3 * 32 * 32))
        files[name] = b"".join(
            bytes((groups.index(SUPERCLASS[fine]), label)) + pixels[image, label].tobytes()
            for image in range(images)
            for label, fine in enumerate(FINE)
        )
    return files


def write_tar(path: Path, files: dict[str, bytes], folder: str = "cifar-100-binary") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        inner = tarfile.TarInfo(folder)
        inner.type = tarfile.DIRTYPE
        archive.addfile(inner)
        for name, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def mini_imagenet_names() -> dict[str, list[str]]:
    """Names in the form of mini-ImageNet's: 64, 16 and 20 classes."""
    names = [f"n{1_530_000 + 7 * number:08}" for number in range(100)]
    return {"train": names[:64], "val": names[64:80], "test": names[80:]}


def write_mini_imagenet(root: Path, images: int = 2, *, place: str = "images/{file}") -> Path:
    """JPEG images in colour and the three lists, the files where `place` says."""
    for split, names in mini_imagenet_names().items():
        rows = ["filename,label"]
        for number, name in enumerate(names):
            for image in range(images):
                file = f"{name}{image + 1:08}.jpg"
                path = root / place.format(file=file, label=name, split=split)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encoded(noise(number, (12, 9, 3)), "JPEG"))
                rows.append(f"{file},{name}")
        (root / f"{split}.csv").write_text("\n".join([*rows, ""]))
    return root
