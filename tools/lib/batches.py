"""Which faces make which batch, and the processes that cut their crops."""

import sys
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from tools.lib.cli import UserError
from tools.lib.files import cores
from tools.lib.runtime import quiet_worker


def faces_a_step(config, faces: int, world: int) -> int:
    """The number of faces per optimizer step, a multiple of processes x micro-batches. Raises UserError."""
    parts = config.accumulate * world
    if config.batch_size % parts or parts > faces:
        raise UserError(f"--batch-size {config.batch_size}: must be a multiple of --accumulate x processes, "
                        f"{parts}, and that must be at most the number of faces, {faces}")
    return min(config.batch_size, faces - faces % parts)


def epoch_batches(plan, first: int = 0, rank: int = 0, world: int = 1) -> Iterator[list[tuple]]:
    """Micro-batches of (epoch, index, crop size) from epoch `first` on, for one DataLoader and one pass.

    Thus workers start only once and fetch ahead beyond an epoch's end and during validation. The order is a
    pure function of (seed, epoch); a last, smaller batch is dropped. plan: faces, batch_size, steps,
    size(epoch) and config.
    """
    config, n = plan.config, plan.batch_size
    for epoch in range(first, config.epochs):
        order = np.random.default_rng((config.seed, epoch)).permutation(plan.faces)
        for step in range(plan.steps):
            mine = order[step * n:(step + 1) * n][rank::world]
            for micro in np.array_split(mine, config.accumulate):
                yield [(epoch, int(i), plan.size(epoch)) for i in micro]


class Whole(torch.utils.data.Dataset):
    """A dataset whose item is a whole batch: a list of items, as dataset.batch makes it."""

    def __init__(self, dataset: torch.utils.data.Dataset):
        self.dataset = dataset

    def __getitem__(self, items: list) -> dict:
        return self.dataset.batch(items)


def batches_of(dataset: torch.utils.data.Dataset, sampler: Iterable[list], workers: int,
               device: torch.device) -> Iterator[dict]:
    """One pass over a sampler's batches; no more workers than there are cores for this process.

    For CUDA, batches lie in pinned memory, so that no step waits for the copy. The loader draws its workers'
    seeds from a generator of its own, because the global one is used by a backbone's dropout.
    """
    count = min(workers, cores())
    # By Python 3.14's default, a fork server, the workers of a killed run would live on for ever.
    fork = "fork" if count and sys.platform == "linux" else None
    loader = torch.utils.data.DataLoader(
        Whole(dataset), batch_size=None, sampler=sampler, num_workers=count, worker_init_fn=quiet_worker,
        multiprocessing_context=fork, pin_memory=device.type == "cuda", generator=torch.Generator())
    try:
        yield from loader
    except (ConnectionError, EOFError) as e:  # a killed worker's last batch, named but never sent
        raise RuntimeError("DataLoader worker (pid unknown) ended while it handed a batch over") from e
