"""Public data sets: where they are, under which licence, how they come here, and whether what is here is whole."""

import json
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lib import archives, datasets, downloads, volumes
from lib.downloads import Remote, gigabytes
from lib.errors import CourseError

BRATS = ("FLAIR", "T1", "T1ce", "T2")
IXI = "https://biomedic.doc.ic.ac.uk/brain-development/downloads/IXI"
IXI_MD5 = {"T1": "34901a0593b41dd19c1a1f746eac2d58", "T2": "e3140d78730ecdd32ba92da48c0a9aaa"}  # torchio.datasets.IXI
MSLUB = "muschellij2/open_ms_data"
MSLUB_TREE = f"https://api.github.com/repos/{MSLUB}/git/trees/master?recursive=1"
MSLUB_FILES = f"https://raw.githubusercontent.com/{MSLUB}/master"
MSLUB_NAME = re.compile(r"cross_sectional/MNI/(patient\d+)/(FLAIR|T1|T1POST|T2|GOLD_STANDARD)_\w+\.nii\.gz")
TORCHIO = "The MD5 is the one that TorchIO publishes"
TERMS = "the challenge's terms, accepted with the registration"
SYNAPSE = (
    "Make an account at https://www.synapse.org and have it certified or validated where the page asks for it.",
    "Open {page}, join the challenge, accept its terms by the form of data access, and wait for the permission.",
)
UNPACK = "Unpack it, so that there is a folder a subject, and check it: python -m lib.fetch {name} --check DIR"
DAMAGED = "Give the same command again; if it stays so, the archive at its source is damaged."


@dataclass(frozen=True)
class Source:
    """A public data set. `size`: bytes, about, 0 where not known; `folder`: its place among the downloads, `data`: what
    `--data` is given, where that is a folder above; `remotes`: its files, None where it is behind a registration;
    `steps`: what to do then; `run`: the options of ./run_all.sh for its folder; `checksums`: who publishes them."""

    title: str
    licence: str
    page: str
    subjects: int
    modalities: tuple[str, ...]
    masks: bool
    size: float = 0.0
    folder: str = ""
    data: str = ""
    remotes: Callable[[], list[Remote]] | None = None
    steps: tuple[str, ...] = ()
    run: str = "--data {} --modality FLAIR"
    checksums: str = ""


def bring(source: Source, root: Path) -> tuple[Path, list[str]]:
    """Fetch a data set into its folder below `root`, which appears only when it is whole; returns the folder and
    sentences for people.

    Until then all is in `NAME.part` beside, which a later call goes on with. The SHA-256 of what came is kept in
    `NAME.json`, and compared with that of an earlier time. Raises CourseError as `downloads.fetch`.
    """
    target = root / source.folder
    if target.exists():
        return target, [f"{target} is there already; to fetch it anew, remove it first."]
    remotes = source.remotes()
    half = root / f"{target.name}.part"
    downloads.check_space(root, sum(r.size for r in remotes) - _bytes(half))
    archive = remotes[0].name.endswith(".tar")
    content = half if archive else half / "files"
    sums = {r.name: downloads.fetch(r, content, copies=int(archive)) for r in remotes}
    if archive:
        content = _unpacked(half, remotes[0].name)
    target.parent.mkdir(parents=True, exist_ok=True)
    content.rename(target)
    shutil.rmtree(half)
    return target, list(_compared(root / f"{target.name}.json", source, {r.url: sums[r.name] for r in remotes}))


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _unpacked(half: Path, archive: str) -> Path:
    unpacked = half / "files"
    shutil.rmtree(unpacked, ignore_errors=True)
    unpacked.mkdir()
    try:
        return archives.unpack_tar(half / archive, unpacked, DAMAGED)
    except OSError as error:
        what = f"{half / archive} cannot be unpacked: {error.strerror}."
        raise CourseError(what, f"Make room on the disk. {downloads.ON}") from error


def _compared(note: Path, source: Source, sums: dict[str, str]) -> Iterator[str]:
    """What differs from the data set that was fetched at an earlier time; the new sums take the place of the old."""
    try:
        earlier = json.loads(note.read_bytes())["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        earlier = {}
    other = sorted(url for url in earlier.keys() & sums.keys() if earlier[url] != sums[url])
    if other:
        yield f"{len(other)} of {len(sums)} files are not those of the earlier time, as {other[0]}."
    kept = {"title": source.title, "licence": source.licence, "page": source.page, "sha256": sums}
    volumes.write_bytes(note, json.dumps(kept, indent=1).encode())
    yield f"{source.checksums}; the SHA-256 of what came is kept in {note}."


def check(source: Source, folder: Path) -> tuple[list[str], list[str]]:
    """What a folder of a data set holds, in sentences, and what it lacks, empty where it is whole.

    Raises CourseError for a folder without scans that are recognised.
    """
    dataset = datasets.find_subjects(folder)
    wanted = (*source.modalities, *(["lesion mask"] if source.masks else []))
    lacking = {s.id: [w for w in wanted if w not in s.scans and not (w == "lesion mask" and s.lesion_mask)]
               for s in dataset.subjects}  # fmt: skip
    whole = sum(not lacks for lacks in lacking.values())
    by_lack = defaultdict(list)
    for subject, lacks in lacking.items():
        if lacks:
            by_lack[" and no ".join(lacks)].append(subject)
    problems = [f"No {what}: {_some(names)}." for what, names in sorted(by_lack.items())]
    if whole != source.subjects:
        problems.insert(0, f"{whole} subjects have {' and '.join(wanted)}, and {source.subjects} belong to it.")
    return list(dataset.notes), problems


def _some(names: list[str], shown: int = 5) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _ixi(modality: str) -> list[Remote]:
    return [Remote(f"{IXI}/IXI-{modality}.tar", f"IXI-{modality}.tar", f"md5:{IXI_MD5[modality]}")]


def _decathlon() -> list[Remote]:
    from monai.apps.datasets import DecathlonDataset as Decathlon  # and torch with it

    task = "Task01_BrainTumour"
    return [Remote(Decathlon.resource[task], f"{task}.tar", f"md5:{Decathlon.md5[task]}")]


def _mslub() -> list[Remote]:
    """The files registered to MNI, brain-extracted, by the repository's own listing, with git's checksums."""
    listed = downloads.read_json(MSLUB_TREE).get("tree", [])
    found = {e["path"]: e for e in listed if e.get("type") == "blob" and MSLUB_NAME.fullmatch(e["path"])}
    parts = [MSLUB_NAME.fullmatch(path).groups() for path in found]
    count = len({patient for patient, _ in parts})
    source = SOURCES["mslub"]
    if count != source.subjects or len(parts) < 4 * count:
        what = f"{MSLUB} lists {len(parts)} files of {count} patients, and {source.subjects} belong to it."
        raise CourseError(what, f"See {source.page} and fetch it by hand.")
    return [
        Remote(f"{MSLUB_FILES}/{path}", "/".join(path.split("/")[2:]), f"git:{entry['sha']}", entry["size"])
        for path, entry in found.items()
    ]


SOURCES = {
    "ixi_t1": Source(
        "IXI, healthy subjects of three scanners, T1 of the whole head", "CC BY-SA 3.0",
        "https://brain-development.org/ixi-dataset/", 581, ("T1",), False, 4.5e9, "IXI/IXI-T1", "IXI",
        lambda: _ixi("T1"), run="--healthy {} --data PATIENTS --modality T1", checksums=TORCHIO,
    ),
    "ixi_t2": Source(
        "IXI, healthy subjects of three scanners, T2 of the whole head", "CC BY-SA 3.0",
        "https://brain-development.org/ixi-dataset/", 578, ("T2",), False, 3.9e9, "IXI/IXI-T2", "IXI",
        lambda: _ixi("T2"), run="--healthy {} --data PATIENTS --modality T2", checksums=TORCHIO,
    ),
    "msd_brain": Source(
        "Medical Segmentation Decathlon, Task01_BrainTumour (gliomas of BraTS 2016 and 2017)", "CC BY-SA 4.0",
        "http://medicaldecathlon.com", 484, BRATS, True, 7.1e9, "Task01_BrainTumour", "",
        _decathlon, checksums="The MD5 is the one that MONAI publishes",
    ),
    "mslub": Source(
        "MSLUB, multiple sclerosis, 3D MR with the consensus of raters, brain-extracted in MNI space", "CC BY 4.0",
        f"https://github.com/{MSLUB}", 30, ("FLAIR", "T1", "T2"), True, 0.15e9, "MSLUB", "",
        _mslub, checksums="Git's SHA-1 of each file comes with the repository's listing",
    ),
    "brats2020": Source(
        "BraTS 2020, gliomas", TERMS,
        "https://www.med.upenn.edu/cbica/brats2020/registration.html", 369, BRATS, True,
        steps=(
            "Follow 'Registration / Data Request' on {page}: an account at ipp.cbica.upenn.edu, then the request.",
            "Fetch MICCAI_BraTS2020_TrainingData.zip by the link that is sent.",
            UNPACK,
        ),
    ),
    "brats2021": Source(
        "BraTS 2021 (RSNA-ASNR-MICCAI), gliomas", TERMS,
        "https://www.synapse.org/Synapse:syn25829067/wiki/610865", 1251, BRATS, True,
        steps=(*SYNAPSE, "Fetch the training data of task 1, a zip or tar file with TrainingData in its name.", UNPACK),
    ),
    "brats2022": Source(
        "BraTS 2022, gliomas; its training data are those of 2021", TERMS,
        "https://www.synapse.org/Synapse:syn27046444", 1251, BRATS, True,
        steps=(*SYNAPSE, "Fetch the training data, or use those of brats2021.", UNPACK),
    ),
    "brats2023": Source(
        "BraTS 2023 GLI (ASNR-MICCAI), gliomas", TERMS,
        "https://www.synapse.org/Synapse:syn51156910/wiki/627000", 1251, BRATS, True,
        steps=(*SYNAPSE, "Fetch ASNR-MICCAI-BraTS2023-GLI-Challenge-TrainingData.zip.", UNPACK),
    ),
    "rsna_miccai": Source(
        "RSNA-MICCAI 2021, gliomas in DICOM without masks", "the competition's rules, accepted on Kaggle",
        "https://www.kaggle.com/competitions/rsna-miccai-brain-tumor-radiogenomic-classification", 585, BRATS, False,
        steps=(
            "Make an account at https://www.kaggle.com, open {page} and accept the rules under 'Data'.",
            "Fetch it by 'Download All', or by Kaggle's own command: kaggle competitions download -c "
            "rsna-miccai-brain-tumor-radiogenomic-classification",
            "Unpack it, so that there is train/00000/FLAIR/*.dcm with train_labels.csv beside train, and check it: "
            "python -m lib.fetch {name} --check DIR/train",
        ),
    ),
    "atlas": Source(
        "ATLAS R2.0, strokes, T1 of the whole head in MNI space", "its terms of use, accepted by the form",
        "https://fcon_1000.projects.nitrc.org/indi/retro/atlas.html", 655, ("T1",), True, run="--data {} --modality T1",
        steps=(
            "Read the terms on {page} and fill in the form; the password is sent by mail.",
            "Fetch ATLAS_R2.0_encrypted.tar.gz by the link there. Its SHA-256, by a tutorial of the challenge: "
            "b9cdf26486e7dd325d5d6617f2218204bbaa0b649dbca03e729a41a449bef671",
            "openssl aes-256-cbc -md sha256 -d -a -in ATLAS_R2.0_encrypted.tar.gz -out ATLAS_R2.0.tar.gz",
            "Unpack it; masks are in Training alone. Check that: python -m lib.fetch {name} --check ATLAS_2/Training",
        ),
    ),
}  # fmt: skip


def told(name: str) -> list[str]:
    """A data set's size, licence and page in sentences, and the steps where it is behind a registration."""
    source = SOURCES[name]
    size = f", some {gigabytes(source.size)}" if source.size else ""
    lines = [f"{source.title}: {source.subjects} subjects, {', '.join(source.modalities)}{size}."]
    lines.append(f"Licence: {source.licence}. Whom to cite: {source.page}")
    steps = (step.format(page=source.page, name=name) for step in source.steps)
    return lines + [f"  {number}. {step}" for number, step in enumerate(steps, 1)]
