"""Flow matching in a LatentDiffusion: what the network is told, which levels it is trained on, and with what both meet."""
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import scepter.components  # noqa: F401
from scepter.core import streams
from scepter.core.config import Config
from scepter.core.disk import checkpoints
from scepter.core.faults import ConfigError
from scepter.core.registry import BACKBONES, DATASETS, MODELS, SAMPLERS, SCHEDULES
from scepter.core.schema import param
from scepter.data.datasets import BaseDataset
from scepter.models.base import BaseModel
from scepter.run_train import main as run_train
from scepter.weights.families.process import write_config

FLOW = {'PARAMETERIZATION': 'flow', 'SCHEDULE_ARGS': {'NAME': 'flow', 'SHIFT': 3.0}, 'TIMESTEP_DENSITY': {'NAME': 'logit_normal'}}


@BACKBONES.register_class()
class Listener(BaseModel):
    """One weight, and a record of the times it was told."""

    OUT_CHANNELS: int = param(3)

    def __init__(self, cfg: dict, logger: Any = None):
        super().__init__(cfg, logger=logger)
        self.weight = nn.Parameter(torch.ones(()))
        self.told: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.told.append(t)
        return self.weight * x


def painter(**settings: Any) -> Any:
    return MODELS.build({'NAME': 'LatentDiffusion', 'DIFFUSION_MODEL': {'NAME': 'Listener'}, 'SIZE_FACTOR': 1, 'SCALE_FACTOR': 1.0,
                         'IMAGE_SIZE': 4, **FLOW, **settings})


def trained(model: Any, count: int = 64, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(the loss of a batch, the times that the network was told)."""
    image = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    with streams.current(1, range(count)), torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
        loss = model('train', image=image)['loss']
    return loss, model.model.told.pop()


def drawn(model: Any, **how: Any) -> tuple[Tensor, Tensor]:
    """(the pictures, the times that the network was told)."""
    model.model.told.clear()
    results = model('test', num_samples=2, **{'seed': 3, 'sample_steps': 4, **how})
    return torch.stack([r['image'] for r in results]), torch.stack(model.model.told)


def test_a_flow_network_is_told_a_thousand_sigma_in_training_and_in_drawing():
    model = painter()
    told = 1000 * model.diffusion.sigmas
    indices = model.draw_levels('timestep', 1000, 0)
    assert indices.dtype == torch.int64
    _, seen = trained(model)
    with streams.current(1, range(64)):
        assert torch.equal(seen, told[model.draw_levels('timestep', 1000, 64)].float())
    assert torch.equal(drawn(model)[1][:, 0], told[[999, 749, 499, 249]].float())


@pytest.mark.parametrize('parameterization', ['flow', 'v'])
def test_a_config_from_before_there_was_flow_tells_the_index_as_it_did(parameterization):
    model = painter(SCHEDULE_ARGS={'NAME': 'shifted'}, TIMESTEP_DENSITY={'NAME': 'uniform'}, PARAMETERIZATION=parameterization)
    with streams.current(1, range(64)):
        assert torch.equal(trained(model)[1], streams.integers('timestep', 1000, 64))
    assert torch.equal(drawn(model)[1][:, 0], torch.tensor([999, 749, 499, 249]))


def test_without_a_density_levels_are_drawn_evenly_and_as_they_were():
    told = [trained(MODELS.build({k: v for k, v in painter(**how).cfg.items() if k != 'TIMESTEP_DENSITY' or how}))[1]
            for how in ({}, {'TIMESTEP_DENSITY': {'NAME': 'uniform'}})]
    with streams.current(1, range(64)):
        even = streams.integers('timestep', 1000, 64)
    assert all(torch.equal(t, (1000 * painter().diffusion.sigmas)[even].float()) for t in told)


def test_the_density_says_which_noise_is_seen():
    low, high = (trained(painter(TIMESTEP_DENSITY={'NAME': 'logit_normal', 'MEAN': mean}), 500)[1].mean() for mean in (-2.0, 2.0))
    assert low < 400 and high > 900    # of 1000 sigma, under a shift of 3


def test_a_flow_drawn_under_another_shift_is_told_the_noise_that_it_sees():
    model, other = painter(), painter(SCHEDULE_ARGS={'NAME': 'flow', 'SHIFT': 1.0})
    assert torch.equal(drawn(model)[1][0], drawn(other)[1][0])
    assert torch.equal(drawn(other)[1][:, 0], torch.tensor([1000.0, 750.0, 500.0, 250.0]))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_times_are_not_rounded_where_the_network_computes_in_half_precision(dtype):
    whole, half = painter(), painter().to(dtype)
    assert trained(half, dtype=dtype)[1].dtype == torch.float32 and torch.equal(trained(half, dtype=dtype)[1], trained(whole)[1])
    assert torch.equal(drawn(half)[1], drawn(whole)[1])


@pytest.mark.parametrize('gamma', [None, 5.0])
@pytest.mark.parametrize('loss', [None, {'NAME': 'ReconstructLoss', 'LOSS_TYPE': 'huber'}])
def test_a_flow_has_a_finite_loss_and_gradient_at_every_level(gamma, loss):
    model = painter(MIN_SNR_GAMMA=gamma, LOSS=loss, TIMESTEP_DENSITY={'NAME': 'uniform'}, TIMESTEPS=5)
    value, told = trained(model)
    value.backward()
    assert set(told.tolist()) == set((1000 * model.diffusion.sigmas).float().tolist())    # pure noise among them
    assert value.isfinite() and model.model.weight.grad.isfinite() and model.model.weight.grad != 0


@pytest.mark.parametrize('sampler', [*SAMPLERS, 'dpmpp_2m_karras', 'heun_karras'])
def test_every_sampler_draws_from_a_flow_and_tells_it_the_noise(sampler):
    picture, told = drawn(painter(), sampler=sampler)
    assert picture.isfinite().all() and told.dtype == torch.float32
    assert told.max() == 1000 and (told[:, 0] > 0).all() and len(told.unique()) > 2


def test_image_to_image_begins_at_the_noise_of_its_strength():
    image = torch.zeros(2, 3, 4, 4)
    _, told = drawn(painter(), image=image, denoising_strength=0.5)
    assert torch.equal(told[:, 0], (1000 * painter().diffusion.sigmas)[[499, 249]].float())


# ---------------------------------------------------------------- what is refused
@pytest.mark.parametrize(('wrong', 'words'), [
    ({'ZERO_TERMINAL_SNR': True}, 'PARAMETERIZATION: flow on flow: .* a flow ends in pure noise by itself'),
    ({'PARAMETERIZATION': 'eps'}, "PARAMETERIZATION: eps on flow: prediction 'eps' says nothing about x0 at level 999"),
    ({'TIMESTEP_DENSITY': {'NAME': 'logit_norm'}}, 'TIMESTEP_DENSITY.NAME: LEVELS has no logit_norm; did you mean logit_normal?'),
    ({'TIMESTEP_DENSITY': {'NAME': 'logit_normal', 'STD': 0.0}}, 'TIMESTEP_DENSITY.STD: expected above 0'),
    ({'TIMESTEP_DENSITY': {'NAME': 'logit_normal', 'COUNT': 2}}, 'TIMESTEP_DENSITY.COUNT: no such parameter')])
def test_what_cannot_be_trained_is_a_fault_of_the_config(wrong, words):
    with pytest.raises(ConfigError, match=words):
        painter(**wrong)


@pytest.fixture
def own_times():
    """A user's schedule that preserves variance and tells the network times of its own."""
    def told(n: int, *, count: int = 1000) -> tuple[Tensor, Tensor, Tensor]:
        return *SCHEDULES.get('cosine')(n), torch.linspace(0, 1, count)
    SCHEDULES.register_function('own_times')(told)
    yield
    del SCHEDULES._entries['own_times']


def test_a_schedule_of_ones_own_may_tell_its_own_times(own_times):
    model = painter(SCHEDULE_ARGS={'NAME': 'own_times'}, PARAMETERIZATION='v', ZERO_TERMINAL_SNR=True)
    assert model.diffusion.alphas[-1] == 0
    assert trained(model)[1].max() <= 1 and drawn(model)[1].max() == 1
    with pytest.raises(ConfigError, match=r'times \[3\] for 1000 levels: expected one finite number for each'):
        painter(SCHEDULE_ARGS={'NAME': 'own_times', 'COUNT': 3}, PARAMETERIZATION='v')


def test_a_schedule_with_times_is_not_exported_as_one_that_tells_the_index(own_times):
    with pytest.raises(ValueError, match='tell a network the index of a level, not the times of own_times'):
        write_config(painter(SCHEDULE_ARGS={'NAME': 'own_times'}, PARAMETERIZATION='v'))


# ---------------------------------------------------------------- a run
@DATASETS.register_class()
class Squares(BaseDataset):
    """Eight small pictures.    image [3, 4, 4]"""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {'image': torch.full((3, 4, 4), index / 4 - 1)}


def test_a_run_of_flow_matching_that_is_resumed_is_the_whole_run_to_the_bit(tmp_path):
    model = {'NAME': 'LatentDiffusion', 'DIFFUSION_MODEL': {'NAME': 'Listener'}, 'SIZE_FACTOR': 1, 'SCALE_FACTOR': 1.0, 'IMAGE_SIZE': 4,
             'MIN_SNR_GAMMA': 5.0, **FLOW}
    cfg = {'SOLVER': {'NAME': 'LatentDiffusionSolver', 'MODEL': model, 'DTYPE': 'bfloat16', 'RESUME_FROM': 'auto',
                      'OPTIMIZER': {'NAME': 'AdamW', 'LEARNING_RATE': 1e-2}, 'TRAIN_DATA': {'NAME': 'Squares', 'BATCH_SIZE': 4},
                      'TRAIN_HOOKS': [{'NAME': 'ModelEmaHook', 'BETA': 0.5}, {'NAME': 'CheckpointHook', 'INTERVAL': 0}]}}
    (tmp_path / 'flow.yaml').write_text(str(Config(cfg)))

    def run(name: str, steps: int) -> dict[str, Tensor]:
        words = [f'SOLVER.WORK_DIR={tmp_path / name}', f'SOLVER.MAX_STEPS={steps}', 'ENV.DEVICE=cpu']
        assert run_train(['--cfg', str(tmp_path / 'flow.yaml'), *words]) == 0
        saved = checkpoints.load(checkpoints.folder_of(tmp_path / name / 'checkpoints', steps))
        return {f'{group}/{key}': value for group in saved.groups for key, value in saved.group(group).items()}

    whole, first, second = run('whole', 4), run('halves', 2), run('halves', 4)
    assert whole.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in whole.items())
    assert not torch.equal(first['model/model.weight'], second['model/model.weight'])
