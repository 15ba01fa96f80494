"""A job trained to its end, and a snapshot of the properties of a base that other code must not change."""

from lora_core.base_model.model import BaseModel
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from tests.lora_core.scenarios import Submission, admit, config, dataset

JOB = Submission(config=config(num_steps=6, learning_rate=2e-2), train=dataset(1, [20, 33, 15]))


def trained(base: BaseModel, job: Submission = JOB) -> Engine:
    engine = Engine(base, EngineConfig())
    admit(engine, "job", job)
    while not engine.idle:
        engine.tick()
    return engine


def snapshot(base: BaseModel) -> dict[str, object]:
    facts: dict[str, object] = {
        "types": [(name, type(module)) for name, module in base.model.named_modules()],
        "attributes": [(name, sorted(vars(module))) for name, module in base.model.named_modules()],
        "attention": base.model.config._attn_implementation,
        "training": [module.training for module in base.model.modules()],
        "gradients": [(name, p.requires_grad, p.grad) for name, p in base.model.named_parameters()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in base.model.modules()],
        "config": base.model.config.to_dict(),
    }
    return facts | {"weights": [p.sum().item() for p in base.model.parameters()]}
