"""The detectors by name, and how a saved one comes back."""

from pkgutil import resolve_name

from lib.errors import CourseError
from lib.models.detector import Detector, NetworkDetector, SliceDetector, read_file

AE = "lib.models.autoencoder:Autoencoder"
DETECTORS = {
    "ae": (AE, {}),
    "ae_dense": (AE, {"bottleneck": "dense"}),
    "ae_ssim": (AE, {"loss": "ssim"}),
    "ae_attention": (AE, {"attention": True}),
    "vae": ("lib.models.vae:VariationalAutoencoder", {}),
    "vae_restoration": ("lib.models.vae:Restoration", {}),
    "gan": ("lib.models.gan:Gan", {}),
    "anogan": ("lib.models.anogan:AnoGan", {}),
    "f_anogan": ("lib.models.f_anogan:FAnoGan", {}),
    "ganomaly": ("lib.models.ganomaly:Ganomaly", {}),
    "vit_context_dropout": ("lib.models.vit:ContextDropout", {}),
    "vit_masked": ("lib.models.vit:Masked", {}),
    "dae": ("lib.models.dae:DenoisingAutoencoder", {}),
    "synthetic_lesions": ("lib.models.synthetic:SyntheticLesions", {}),
    "sided_ensemble": ("lib.models.sided:SidedEnsemble", {}),
    "synthetic_restoration": ("lib.models.dae:SyntheticRestoration", {}),
    "diffusion": ("lib.models.diffusion:Diffusion", {}),
    "diffusion_patched": ("lib.models.diffusion:PatchedDiffusion", {}),
    "features": ("lib.models.features:Features", {}),
    "cae3d": ("lib.models.cae3d:VolumeAutoencoder", {}),
    "mirror": ("lib.models.mirror:Mirror", {}),
    "single_anogan": ("lib.models.single_nets:SingleAnoGAN", {}),
    "single_ae": ("lib.models.single_nets:SingleAutoencoder", {}),
    "single_masked": ("lib.models.single:Masked", {}),
    "single_similarity": ("lib.models.single:Similarity", {}),
    "single_ensemble": ("lib.models.single:Ensemble", {}),
    "empty": ("lib.baselines:Empty", {}),
    "random": ("lib.baselines:Random", {}),
    "intensity": ("lib.baselines:Intensity", {}),
    "intensity_median": ("lib.baselines:IntensityMedian", {}),
    "atlas_z": ("lib.baselines:AtlasZ", {}),
    "blur": ("lib.baselines:Blur", {}),
    "brain_area": ("lib.baselines:BrainArea", {}),
    "slice_index": ("lib.baselines:SliceIndex", {}),
}


def create(name: str, modalities: tuple[str, ...], **settings) -> Detector:
    """A detector that is not fitted yet; `settings` are fields of its Settings. "ae@1" is `ae` under a name for its
    training with seed 1."""
    method = name.partition("@")[0]
    if method not in DETECTORS:
        raise CourseError(f"There is no detector {method!r}.", f"Detectors are: {', '.join(DETECTORS)}.")
    place, fixed = DETECTORS[method]
    kind = resolve_name(place)
    return kind(name, modalities, kind.Settings(**(settings | fixed)))


def family(name: str) -> str:
    """The family a detector belongs to; "baseline" for what needs no model."""
    return resolve_name(DETECTORS[name][0]).family


def draws(name: str) -> bool:
    """Whether a detector redraws slices as a healthy brain would have them."""
    kind = resolve_name(DETECTORS[name][0])
    return issubclass(kind, NetworkDetector) and callable(getattr(kind, "redraw", None))


def load(path) -> Detector:
    """A fitted detector from its file; CourseError where the file is missing or damaged."""
    about, state = read_file(path)
    detector = create(about["name"], tuple(about["modalities"]), **about["settings"])
    detector.restore(state)
    return detector


__all__ = ["DETECTORS", "Detector", "SliceDetector", "create", "draws", "family", "load"]
