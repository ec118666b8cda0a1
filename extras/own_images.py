"""The oracle of own images (train.py --data): the set of images itself, which learns nothing.

*Exact*: in how many samples the nearest image of the set, pixel by pixel, is the prompt's own.
*Choice*: in how many it is nearer to the own image than to the twin's. *Pair accuracy*: in how many
pairs that holds for all 2K samples.

Shapes: P pairs, 2 prompts, K images a prompt, M images of the set, H W image.
"""
import numpy as np

from data import load_image

GALLERY = 4000                          # most images of a set that samples are compared with


def measure_own(pairs, gallery):
    """What `eval_paircomp.paircomp` measures of these pairs, or None if one has no images."""
    if not pairs.has_images().all():
        return None
    own = pairs.load(np.arange(len(pairs)))
    return lambda images: nearest_images(images, own, gallery)


def load_gallery(train, held_out):
    """The images that samples are compared with: all of the held-out sets, and of the training
    pairs as many as GALLERY, each once, by chance -> (M, H, W, 3) uint8."""
    files = list(dict.fromkeys(file for two in train.images if two for file in two))
    shown = np.random.default_rng(0).permutation(len(files))[:GALLERY]
    images = [load_image(files[i], train.size)[None] for i in shown]
    for pairs in held_out:
        loaded = pairs.load(np.flatnonzero(pairs.has_images()))         # (P, 2, H, W, 3)
        images.append(loaded.reshape(-1, *loaded.shape[2:]))
    return np.concatenate(images)


def nearest_images(images, own, gallery):
    """The oracle of own images. images (P, 2, K, H, W, 3) uint8, own (P, 2, H, W, 3), gallery
    (M, H, W, 3): the images of the set -> {"exact", "choice": shares of a pair's samples,
    "pair_accuracy": 0 or 1}, (P,) each."""
    def flat(x):
        return x.reshape(-1, own[0, 0].size).astype(np.float32) / 255

    def distance(a, b):                                 # (.., D), (.., D), broadcast -> (..)
        return np.square(a - b).mean(-1)

    n_pairs, _, k = images.shape[:3]
    shown = flat(images).reshape(n_pairs, 2, k, -1)     # (P, 2, K, D)
    target = flat(own).reshape(n_pairs, 2, 1, -1)       # (P, 2, 1, D)
    to_own = distance(shown, target)                    # (P, 2, K)
    chosen = to_own < distance(shown, target[:, ::-1])
    known = flat(gallery)                               # (M, D)
    squares = np.square(known).mean(-1)                 # |a - b|^2 without the |a|^2 of the sample
    nearest = (squares - 2 / known.shape[1] * flat(images) @ known.T).min(-1)       # (P*2*K,)
    nearest = nearest.reshape(to_own.shape) + np.square(shown).mean(-1)
    exact = to_own <= nearest + 1e-6
    return {"exact": exact.mean((1, 2)), "choice": chosen.mean((1, 2)),
            "pair_accuracy": chosen.all((1, 2)).astype(float)}
