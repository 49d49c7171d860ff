"""examples/nova: the recipes for GPUs are without faults and of the published sizes."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scepter import run_train
from scepter.core.config import Config
from scepter.core.registry import BACKBONES, MODELS
from scepter.models.restore import without_weights

NOVA = Path(__file__).resolve().parents[1] / 'examples' / 'nova'


@pytest.mark.parametrize(('recipe', 'millions'), [('t2i_0.6b_1024', 645.7), ('t2v_0.6b_480', 644.2)])
def test_a_recipe_for_gpus_is_without_faults_and_of_its_published_size(recipe, millions):
    assert run_train.main(['--cfg', str(NOVA / f'{recipe}.yaml'), '--check']) == 0
    node = without_weights(Config.load(NOVA / f'{recipe}.yaml').SOLVER.MODEL)
    with torch.device('meta'):
        model = MODELS.build(Config({**node, 'COND_STAGE_MODEL': None}))
        network = BACKBONES.build(node.NETWORK)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == millions
    assert model.first_stage_model.size_factor == network.IMAGE_STRIDE == 8
    assert node.COND_STAGE_MODEL.MAX_LENGTH == network.TEXT_TOKEN_LEN
