"""The kind of an ear and the pose of a face, decided only from the true landmarks.

The eyes set the frame of a face: "along" is the line from one interocular landmark to the other, "up" is
perpendicular to it, away from the nose, so tilting the head changes nothing. The thresholds were chosen by
looking at faces of DogFLW's train split (3,408 faces, 6,816 ears), and lie where few ears do.
"""
import numpy as np

# Heights in an ear are measured from the middle of its base, in units of the distance from there to the
# ear's farthest landmark. Four fifths of the ears have a tip above 0.8 or below -0.8.
ERECT_TIP, ERECT_FALL = 0.5, 0.25  # the tip is this high at least, and less than this below the highest point
HANGING_TIP, HANGING_PEAK = -0.25, 0.25  # the tip is lower than this, and no point is this high
# The nose's offset from the eyes' midpoint, along their line, in units of the distance between them. From
# 0.25 on, a face is visibly turned (13 % of the faces); in the median face the offset is 0.09.
TURNED = 0.25


def face_frame(faces) -> tuple[np.ndarray, np.ndarray]:
    """Every face's unit vector up (N, 2), and its nose's offset in eye distances (N,); NaN if unknown."""
    nose = faces.scheme.regions.get("nose", [])
    if not faces.scheme.interocular or not nose:
        return np.full((len(faces), 2), np.nan), np.full(len(faces), np.nan)
    points, seen, (i, j) = faces.points, faces.visible > 0, faces.scheme.interocular
    with np.errstate(invalid="ignore", divide="ignore"):
        weight = seen[:, nose, None] / seen[:, nose].sum(1)[:, None, None]
        tip = (np.where(weight > 0, points[:, nose], 0) * weight).sum(1)
        eyes = points[:, j] - points[:, i]
        length = np.where(seen[:, [i, j]].all(1), np.linalg.norm(eyes, axis=1), np.nan)[:, None]
        along = np.where(length > 0, eyes / length, np.nan)
    to_nose = tip - (points[:, i] + points[:, j]) / 2
    up = np.stack([along[:, 1], -along[:, 0]], 1)
    up = np.where((up * to_nose).sum(1, keepdims=True) > 0, -up, up)
    up[np.isnan(to_nose).any(1)] = np.nan
    return up, (to_nose * along).sum(1) / length[:, 0]


def ears_of(scheme) -> list[tuple[list, list, list]]:
    """The landmarks of each ear: [(base, tip, all), ...]; empty where names and partners do not tell them."""
    ear, ears = set(scheme.regions.get("ear", [])), []
    for side in zip(*(pair for pair in scheme.flip_pairs if set(pair) <= ear)):
        base, tip = ([i for i in side if word in scheme.names[i].lower()] for word in ("base", "tip"))
        if base and tip:
            ears.append((base, tip, list(side)))
    return ears


def ear_kinds(faces) -> dict[str, np.ndarray]:
    """{"erect", "folded", "hanging": the landmarks of such ears, a mask (N, K)}; without empty kinds.

    An erect ear's tip stands up. A hanging ear's tip lies below its base, and no part of it rises. All
    others are folded: they rise and bend, or stand out to the side.
    """
    up, seen = face_frame(faces)[0], faces.visible > 0
    masks = {kind: np.zeros(seen.shape, bool) for kind in ("erect", "folded", "hanging")}
    for base, tip, ear in ears_of(faces.scheme):
        known = seen[:, base].all(1) & seen[:, tip].all(1) & np.isfinite(up[:, 0])
        from_base = faces.points - faces.points[:, base].mean(1, keepdims=True)
        length = np.where(seen, np.linalg.norm(from_base, axis=2), 0)[:, ear].max(1).clip(1e-9)
        height = np.where(seen, (from_base * up[:, None]).sum(2), -np.inf) / length[:, None]
        at_tip, peak = np.where(known, height[:, tip].mean(1), np.nan), height[:, ear].max(1)
        erect = (at_tip >= ERECT_TIP) & (peak - at_tip < ERECT_FALL)
        hanging = (at_tip < HANGING_TIP) & (peak < HANGING_PEAK)
        for kind, rows in (("erect", erect), ("hanging", hanging), ("folded", known & ~erect & ~hanging)):
            masks[kind][np.ix_(rows, ear)] = True
    return {kind: mask for kind, mask in masks.items() if mask.any()}


def poses(faces) -> dict[str, np.ndarray]:
    """{"frontal", "turned": which faces are (N,)}; without empty ones."""
    offset = np.abs(face_frame(faces)[1])
    rows = {"frontal": offset < TURNED, "turned": offset >= TURNED}
    return {pose: which for pose, which in rows.items() if which.any()}
