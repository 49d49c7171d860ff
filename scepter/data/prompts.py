"""Prompts to draw."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from scepter.core.config import Config
from scepter.core.errors import DataError
from scepter.core.faults import Fault
from scepter.core.registry import DATASETS
from scepter.core.schema import param
from scepter.core.stores import FS
from scepter.data.datasets import BaseDataset
from scepter.data.rows import lines, object_of


@DATASETS.register_class()
class PromptListDataset(BaseDataset):
    """Prompts to draw, for TEST_DATA.    index  ->  prompt, and what its line says besides: n_prompt, image_size, seed, ...

    A line of PROMPT_FILE is a prompt; in a .jsonl file it is an object ({"prompt": ..., "seed": 7, "guide_scale": 5.0}), whose keys are
    arguments of the network's forward_test. Those that hold for a whole batch must be equal in it: BATCH_SIZE 1 allows all.
    """

    PROMPTS: list[str] = param([], 'The prompts themselves.')
    PROMPT_FILE: str | None = param(None, 'A file with a prompt per line, or .jsonl with an object per line.')
    N_PROMPT: str | None = param(None, "Negative prompt where a line gives none; null: the network's own.")
    PROMPT_PREFIX: str = param('', 'Put before every prompt.')
    IMAGE_SIZE: int | tuple[int, int] | None = param(
        None, "Pixels, or [height, width], where a line gives none; null: the network's own.", least=1)

    @classmethod
    def check(cls, cfg: Config) -> Iterator[Fault]:
        yield from super().check(cfg)
        if bool(cfg.PROMPTS) == bool(cfg.PROMPT_FILE):
            yield Fault('PROMPTS', f'give either PROMPTS (got {len(cfg.PROMPTS)}) or PROMPT_FILE (got {cfg.PROMPT_FILE})')

    def __init__(self, cfg: dict, logger: Any = None):
        super().__init__(cfg, logger=logger)
        lines = prompts_of_file(self.PROMPT_FILE) if self.PROMPT_FILE else [{'prompt': p} for p in self.PROMPTS]
        common = {key: value for key, value in (('n_prompt', self.N_PROMPT), ('image_size', self.IMAGE_SIZE)) if value is not None}
        self.lines = [{**common, **line, 'prompt': self.PROMPT_PREFIX + line['prompt']} for line in lines]

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self.lines[index])

    def name_of(self, index: int) -> str:
        return f'prompt {index + 1} ({self.lines[index]["prompt"]:.40})'

    def collate(self, samples: list[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
        """Lists of prompts, negative prompts and seeds; every other setting once."""
        batch: dict[str, Any] = {}
        for key in {key: None for sample in samples for key in sample}:
            values = [sample.get(key) for sample in samples]
            for value, name in zip(values, names):
                if value is None or (key not in ('prompt', 'n_prompt', 'seed') and value != values[0]):
                    raise DataError(f'{names[0]} and {name} are drawn in one batch, but have {key} {values[0]!r} and {value!r}: '
                                    'make them equal, or set BATCH_SIZE: 1')
            batch[key] = values if key in ('prompt', 'n_prompt', 'seed') else values[0]
        return batch


def prompts_of_file(address: str) -> list[dict[str, Any]]:
    """A prompt for each line, or, of a .jsonl file, the object in it. Raises DataError."""
    with FS.get_from(address) as path:
        numbered = [(number, line.strip()) for number, line in lines(path) if line.strip()]
    if not numbered:
        raise DataError(f'PROMPT_FILE: {address} holds no prompt')
    if not address.endswith('.jsonl'):
        return [{'prompt': line} for _, line in numbered]
    rows = [object_of(f'{address}, line {number}', line) for number, line in numbered]
    for (number, _), row in zip(numbered, rows):
        if not isinstance(row.get('prompt'), str):
            raise DataError(f'{address}, line {number}: expected a "prompt", got the keys {", ".join(row) or "(none)"}')
    return rows
