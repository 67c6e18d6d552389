"""From a table of features to a label of subjects: classifiers tuned and judged without seeing whom they judge.

Whatever learns from subjects (scaling, the balance of classes, tuning) happens inside the training folds. The folds are
drawn by lot, or they are scanners: what falls from the first to the second was the scanner's. A row of a table is a
patient; patients with several scans need a row of their own making.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations

import numpy as np
import optuna
import pandas as pd
from imblearn.over_sampling import RandomOverSampler
from imblearn.pipeline import Pipeline, make_pipeline
from sklearn import config_context
from sklearn.base import ClassifierMixin
from sklearn.ensemble import GradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from threadpoolctl import threadpool_limits

from lib import domain
from lib.cohort import Cohort, PreparedSubject
from lib.errors import CourseError, check_choice, check_least
from lib.training import derived_seed

TREES = 30
ANY = "any"  # tuning chooses the classifier as well
optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True)
class Plan:
    """`outer` folds whose subjects are held out in turn; within the others `trials` settings, each judged in `inner`
    folds; `permutations`: how often the whole is repeated with shuffled labels, 0 for no p-value."""

    outer: int = 4
    inner: int = 3
    trials: int = 5
    permutations: int = 0

    def __post_init__(self):
        for name, least in {"outer": 2, "inner": 2, "trials": 1, "permutations": 0}.items():
            check_least(name, getattr(self, name), least)


@dataclass(frozen=True)
class HeldOut:
    """`scores` of subjects that the classifier had not seen, float [subject], NaN for those of a fold without both
    classes; `folds` int [subject]; `settings`: what tuning chose, by fold.

    Each fold has a classifier of its own, so its scores have a unit of their own: pairs are compared within a fold.
    """

    scores: np.ndarray
    labels: np.ndarray
    folds: np.ndarray
    settings: dict[int, dict]

    def auroc(self, seed: int = 0) -> tuple[float, float, float]:
        """Mean AUROC of the folds, weighted by their pairs, with its 95 % interval over subjects."""
        seen = np.isfinite(self.scores)
        return domain.auroc_within(self.scores[seen], self.labels[seen], self.folds[seen], seed)


@threadpool_limits.wrap(limits=1)  # tables are small: threads only wait for each other
def held_out(
    table: np.ndarray, labels: Sequence[bool], classifier: str = "logistic", *, sites: Sequence[str] | None = None,
    site_out: bool = False, plan: Plan | None = None, seed: int = 0,
) -> HeldOut | None:  # fmt: skip
    """Scores of every subject by a classifier tuned and fitted without it, from features float [subject, feature].

    `classifier`: a key of CLASSIFIERS, or "any". Folds are drawn by lot with an equal share of either label, and of
    either label at each of `sites` [subject]; with `site_out` each site is a fold. None with fewer than 4 subjects of
    either label, or where no fold can be both learnt without and judged. Raises CourseError for a table that does not
    fit its labels or is not finite.
    """
    labels, plan = np.asarray(labels, bool), plan or Plan()
    check_choice("classifier", classifier, (*CLASSIFIERS, ANY))
    _check(table, labels)
    if _fewer(labels) < domain.LEAST:
        return None
    places = np.zeros(len(labels), int) if sites is None else np.unique(sites, return_inverse=True)[1]
    folds = places if site_out else _by_lot(labels, places, plan.outer, seed)
    scores, settings = np.full(len(labels), np.nan), {}
    with config_context(assume_finite=True, skip_parameter_validation=True):
        for fold in np.unique(folds).tolist():
            away = folds == fold
            if _fewer(labels[away]) and _fewer(labels[~away]) >= 2:
                near = (array[~away] for array in (table, labels, places))
                model, settings[fold] = tuned(*near, classifier, plan, derived_seed(seed, fold))
                scores[away] = _scores(model, table[away])
    return HeldOut(scores, labels, folds, settings) if settings else None


def tuned(
    table: np.ndarray, labels: np.ndarray, places: np.ndarray, classifier: str, plan: Plan, seed: int
) -> tuple[Pipeline, dict]:
    """The pipeline of the highest mean AUROC in inner folds, fitted to all of these subjects, and its settings.

    Settings are drawn by a tree-structured Parzen estimator (Bergstra et al., NeurIPS 2011), the first half by lot.
    """
    folds, state = _by_lot(labels, places, plan.inner, seed), seed % 2**32
    parts = [_part(table, labels, folds == fold, state) for fold in np.unique(folds)]

    def mean_auroc(trial: optuna.Trial) -> float:
        model = _classifier(trial, classifier, state)
        return np.mean([domain.pairs_won(_scores(model.fit(*near), far), truth).mean() for near, far, truth in parts])

    sampler = optuna.samplers.TPESampler(seed=state, n_startup_trials=max(1, plan.trials // 2))
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.optimize(mean_auroc, n_trials=plan.trials)
    model = Pipeline([*_balancing(state).steps, ("classifier", _classifier(study.best_trial, classifier, state))])
    return model.fit(table, labels), study.best_params


def permutation_p(
    table: np.ndarray, labels: Sequence[bool], classifier: str = "logistic", *, sites: Sequence[str] | None = None,
    within: bool = False, plan: Plan, seed: int = 0,
) -> float:  # fmt: skip
    """(1 + shuffled labels whose AUROC reaches that of the true ones) / (1 + permutations), tuning and all repeated.

    Labels are shuffled among all subjects; `within` sites only, what sites and labels have to do with each other stays,
    and a small p says that more than the site was found. NaN where `held_out` is None, or for no permutations.
    """
    labels = np.asarray(labels, bool)
    groups = np.asarray(sites) if within else np.zeros(len(labels))
    ask = partial(held_out, table, classifier=classifier, sites=sites, plan=plan, seed=seed)
    observed = ask(labels) if plan.permutations else None
    if observed is None:
        return float("nan")
    random = np.random.default_rng(derived_seed(seed, "permutations"))
    shuffled = [_shuffled(labels, groups, random) for _ in range(plan.permutations)]
    reached = sum(ask(one).auroc()[0] >= observed.auroc()[0] for one in shuffled)
    return (1 + reached) / (1 + plan.permutations)


def compare(
    tables: Mapping[str, pd.DataFrame], labels: Mapping[str, bool], *, sites: Mapping[str, str] | None = None,
    classifiers: Sequence[str] = ("logistic",), plan: Plan | None = None, permuted: Collection[str] | None = None,
    seed: int = 0,
) -> pd.DataFrame | None:  # fmt: skip
    """A row for each table of features (of subjects by id) and classifier: `auroc` in folds by lot, `site_out` with
    each site held out in turn, both with `_low` and `_high` (95 % intervals over subjects); `p_value` with labels
    shuffled among all and `p_within` among those of a site; `n`.

    `labels`, `sites`: by id; those of `labels` are used. `permuted`: the tables that have p-values, all by default.
    NaN for what cannot be had, as without `sites`; None with fewer than 4 subjects of either label. Raises CourseError
    for a labelled subject without features.
    """
    plan, truth = plan or Plan(), np.array(list(labels.values()), bool)
    if _fewer(truth) < domain.LEAST:
        return None
    places = None if sites is None else [sites[subject] for subject in labels]
    rows = {}
    for (name, table), classifier in ((item, c) for item in tables.items() for c in classifiers):
        ask = partial(_row, _rows_of(name, table, labels), truth, classifier, places, seed)
        asked = permuted is None or name in permuted
        rows[name, classifier] = ask(plan if asked else replace(plan, permutations=0))
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["features", "classifier"])


def unions(tables: Mapping[str, pd.DataFrame], sizes: Collection[int] | None = None) -> dict[str, pd.DataFrame]:
    """Each table and their unions side by side, as "T1", "T1+T2"; `sizes`: how many tables a union has, any by
    default."""
    wanted = range(1, len(tables) + 1) if sizes is None else sizes
    chosen = [names for n in wanted for names in combinations(tables, n)]
    return {"+".join(names): pd.concat([tables[name] for name in names], axis=1) for names in chosen}


def coded(subjects: Sequence[PreparedSubject], encoder: Callable[[PreparedSubject], np.ndarray]) -> pd.DataFrame:
    """What an encoder makes of each subject, a row by id; `encoder` gives float [feature], as `code` of a detector."""
    return pd.DataFrame({s.id: encoder(s) for s in subjects}).T


def by_acquisition(cohorts: Sequence[Cohort]) -> dict[str, pd.DataFrame]:
    """The tables `header and shape` and `histogram` of the subjects that every cohort has, all of whose modalities are
    put side by side: what can be told without looking for a lesion."""
    every = [{s.id: s for s in prepared.subjects} for prepared in cohorts]
    ids = [i for i in every[0] if all(i in members for members in every)]
    parts = [[members[i] for i in ids] for members in every]
    return {
        "header and shape": pd.concat([headers(subjects) for subjects in parts], axis=1),
        "histogram": pd.concat([coded(subjects, domain.histogram) for subjects in parts], axis=1),
    }


def headers(subjects: Sequence[PreparedSubject]) -> pd.DataFrame:
    """What is known of each scan before a voxel is looked at, a row by id: edges of its own voxels and of the prepared
    ones, the shape, and the facts of its acquisition where it has any; words become a column each."""
    facts = pd.DataFrame([_acquisition(s) for s in subjects], index=[s.id for s in subjects])
    words = [name for name in facts if facts[name].map(lambda value: isinstance(value, str)).any()]
    numbers = facts.drop(columns=words).astype(float)
    geometry = coded(subjects, lambda s: np.concatenate([s.own_voxel_mm, domain.header(s)]))
    known = pd.get_dummies(facts[words].astype(str)) if words else facts[words]
    return pd.concat([geometry, numbers.fillna(0), numbers.isna(), known], axis=1).astype(float)


def _acquisition(subject: PreparedSubject) -> dict[str, object]:
    stated = subject.facts.get("acquisition", {})
    return {f"{modality} {name}": value for modality, of in stated.items() for name, value in of.items()}


def _logistic(trial: optuna.Trial, seed: int) -> ClassifierMixin:
    return LogisticRegression(C=trial.suggest_float("C", 1e-3, 10, log=True), max_iter=1000)


def _support_vectors(trial: optuna.Trial, seed: int) -> ClassifierMixin:
    kernel = trial.suggest_categorical("kernel", ["linear", "rbf"])
    return SVC(C=trial.suggest_float("penalty", 1e-2, 1e2, log=True), kernel=kernel)


def _forest(trial: optuna.Trial, seed: int) -> ClassifierMixin:
    depth = trial.suggest_int("forest_depth", 1, 6)
    leaf = trial.suggest_int("leaf", 1, 5)
    return RandomForestClassifier(TREES, max_depth=depth, min_samples_leaf=leaf, random_state=seed, n_jobs=1)


def _boosting(trial: optuna.Trial, seed: int) -> ClassifierMixin:
    return GradientBoostingClassifier(
        n_estimators=TREES, max_depth=trial.suggest_int("boosting_depth", 1, 3), subsample=0.7, max_features="sqrt",
        learning_rate=trial.suggest_float("learning_rate", 0.03, 0.5, log=True), random_state=seed,
    )  # fmt: skip


CLASSIFIERS: dict[str, Callable[[optuna.Trial, int], ClassifierMixin]] = {
    "logistic": _logistic,
    "svm": _support_vectors,
    "forest": _forest,
    "boosting": _boosting,
}


def _classifier(trial: optuna.Trial | optuna.trial.FrozenTrial, name: str, seed: int) -> ClassifierMixin:
    chosen = trial.suggest_categorical("classifier", list(CLASSIFIERS)) if name == ANY else name
    return CLASSIFIERS[chosen](trial, seed)


def _balancing(seed: int) -> Pipeline:
    return make_pipeline(StandardScaler(), RandomOverSampler(random_state=seed))


def _part(table: np.ndarray, labels: np.ndarray, away: np.ndarray, seed: int):
    """What is learnt from, scaled and balanced, as (table, labels); the table to judge by its scale; its labels."""
    steps = _balancing(seed)
    near = steps.fit_resample(table[~away], labels[~away])
    return near, steps[0].transform(table[away]), labels[away]


def _scores(model: Pipeline, table: np.ndarray) -> np.ndarray:
    return model.decision_function(table) if hasattr(model, "decision_function") else model.predict_proba(table)[:, 1]


def _by_lot(labels: np.ndarray, places: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """A fold for each subject, int [subject]: both labels are dealt in turn, in pairs of one place as far as there are.

    Were a fold to hold more of one label from a place, the other label would prevail there among those who are learnt
    from, and the fold would be judged the wrong way round: chance would lie below ½.
    """
    order = np.random.default_rng(derived_seed(seed, "folds")).permutation(len(labels))
    alone, result = np.ones(len(labels), bool), np.empty(len(labels), int)
    for place in np.unique(places):
        sides = [order[(places[order] == place) & (labels[order] == label)] for label in (False, True)]
        for side in sides:
            alone[side[: min(map(len, sides))]] = False
    for label in (False, True):
        dealt = order[labels[order] == label]
        dealt = dealt[np.lexsort((places[dealt], alone[dealt]))]
        result[dealt] = np.arange(len(dealt)) % min(folds, _fewer(labels))
    return result


def _fewer(labels: np.ndarray) -> int:
    return int(min(labels.sum(), (~labels).sum()))


def _shuffled(labels: np.ndarray, groups: np.ndarray, random: np.random.Generator) -> np.ndarray:
    result = labels.copy()
    for group in np.unique(groups):
        result[groups == group] = random.permutation(labels[groups == group])
    return result


def _rows_of(name: str, table: pd.DataFrame, labels: Mapping[str, bool]) -> np.ndarray:
    lacking = [subject for subject in labels if subject not in table.index]
    if lacking:
        what = f"{len(lacking)} labelled subjects have no features of {name}, such as {lacking[0]}."
        raise CourseError(what, "Label only subjects that every table has.")
    return table.loc[list(labels)].to_numpy()


def _row(table, labels, classifier: str, sites, seed: int, plan: Plan) -> dict[str, float]:
    how = {"sites": sites, "plan": plan, "seed": seed}
    figures = _figures("auroc", held_out(table, labels, classifier, **how), seed)
    away = None if sites is None else held_out(table, labels, classifier, site_out=True, **how)
    within = float("nan") if sites is None else permutation_p(table, labels, classifier, within=True, **how)
    chance = {"p_value": permutation_p(table, labels, classifier, **how), "p_within": within}
    return figures | _figures("site_out", away, seed) | chance | {"n": len(labels)}


def _figures(name: str, found: HeldOut | None, seed: int) -> dict[str, float]:
    values = found.auroc(seed) if found else [float("nan")] * 3
    return dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))


def _check(table: np.ndarray, labels: np.ndarray) -> None:
    if np.ndim(table) != 2 or len(table) != len(labels) or not np.shape(table)[1]:
        what = f"A table of features has the shape {np.shape(table)} for {len(labels)} labels."
        raise CourseError(what, "Give a row for each subject and at least one column.")
    if not np.isfinite(table).all():
        what = f"{(~np.isfinite(table)).any(axis=1).sum()} of {len(table)} subjects have features that are no numbers."
        raise CourseError(what, "Leave these subjects out, or fit the encoder again.")
