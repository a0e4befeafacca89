"""How transformers finds expanded models: its Auto classes know `layer_moe` as soon as both packages are imported.

Importing `lit_llm` stays quick: nothing of transformers is imported for it. If transformers' table of configurations is
there already, the entry is made at once; else when it is imported, by a finder that steps aside after that.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.util import find_spec

MODEL_TYPE = "layer_moe"
_TABLE = "transformers.models.auto.configuration_auto"


def register_with_transformers() -> None:
    """Make `AutoConfig` and `AutoModelForCausalLM` read saved expanded models, now or once they are imported."""
    if _TABLE in sys.modules and hasattr(sys.modules[_TABLE], "CONFIG_MAPPING"):
        _register()
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


def _register() -> None:
    from transformers.configuration_utils import PreTrainedConfig

    class LayerMoeConfig(PreTrainedConfig):
        """Stands for the configurations of all families: reading a saved one gives that of its family."""

        model_type = MODEL_TYPE

        @classmethod
        def from_dict(cls, config_dict, **kwargs):
            from lit_llm.models.moe_saving import family_classes

            config_class, _ = family_classes(config_dict.get("base_model_type"))
            return config_class.from_dict(config_dict, **kwargs)

    LayerMoeConfig.__module__ = __name__
    sys.modules[_TABLE].CONFIG_MAPPING.register(MODEL_TYPE, LayerMoeConfig, exist_ok=True)


class _WhenImported(MetaPathFinder):
    """Finds one module by the other finders, and registers after it was executed."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != _TABLE or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = execute_and_register
        return spec
