"""The operators as plugins of TensorRT: one ``IPluginV3`` adapter for all, for both packages.

``tensorrt`` and ``tensorrt_rtx`` have the same interfaces under two names, so the classes are made
for the package that is given.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from functools import cache
from typing import Any, cast

import numpy as np

from maskcast.engines.tensorrt.plugins.driver import Kernels, kernels
from maskcast.engines.tensorrt.plugins.operator import (
    NAMESPACE,
    OPERATORS,
    VERSION,
    ElementType,
    Operator,
    Tensor,
)

_logger = logging.getLogger(__name__)
_registered: dict[str, list[Any]] = {}


def register(trt: Any) -> None:
    """Make the plugins known to a package (the module ``tensorrt`` or ``tensorrt_rtx``), once."""
    if trt.__name__ in _registered:
        return
    registry = trt.get_plugin_registry()
    creators = [_creator_class(trt)(operator) for operator in OPERATORS]
    for creator in creators:
        if not registry.register_creator(creator, NAMESPACE):
            raise RuntimeError(f"{trt.__name__} refuses the plugin {creator.name}")
    _registered[trt.__name__] = creators  # the registry does not keep them alive


def make_plugin(trt: Any, operator: Operator) -> Any:
    """Make the plugin of one operator for a package."""
    return _plugin_class(trt)(operator)


@cache
def _plugin_class(trt: Any) -> type:
    names: dict[Any, ElementType] = {trt.float32: "f32", trt.float16: "f16", trt.int32: "i32"}
    types = {name: dtype for dtype, name in names.items()}
    bases = (
        trt.IPluginV3,
        trt.IPluginV3OneCore,
        trt.IPluginV3OneBuild,
        trt.IPluginV3OneRuntime,
    )

    class Plugin(*bases):  # type: ignore[misc]
        def __init__(self, operator: Operator, loaded: Kernels | None = None) -> None:
            for base in bases:
                base.__init__(self)
            self.operator = operator
            self.loaded = loaded
            self.num_outputs = 1
            self.plugin_name = operator.name
            self.plugin_namespace = NAMESPACE
            self.plugin_version = VERSION
            self.timing_cache_id = ""

        def clone(self) -> Any:
            return Plugin(self.operator, self.loaded)

        def get_capability_interface(self, kind: Any) -> Any:
            del kind
            return self

        def get_output_data_types(self, inputs: Sequence[Any]) -> list[Any]:
            dtype = self.operator.output_type([names.get(dtype, "f32") for dtype in inputs])
            return [types[cast(ElementType, dtype)]]

        def get_output_shapes(self, inputs: Any, shape_inputs: Any, expressions: Any) -> list[Any]:
            del shape_inputs
            dimensions = self.operator.output_shape(inputs)
            shape = trt.DimsExprs(len(dimensions))
            for i, dimension in enumerate(dimensions):
                is_number = isinstance(dimension, int)
                shape[i] = expressions.constant(dimension) if is_number else dimension
            return [shape]

        def supports_format_combination(self, position: int, tensors: Any, inputs: int) -> bool:
            del inputs
            described = [tensor.desc for tensor in tensors[: position + 1]]
            if described[-1].format != trt.TensorFormat.LINEAR:
                return False
            if any(desc.type not in names for desc in described):
                return False
            return self.operator.accepts(position, [names[desc.type] for desc in described])

        def configure_plugin(self, inputs: Any, outputs: Any) -> None:
            del outputs
            self.operator.check([_largest(tensor) for tensor in inputs])

        def on_shape_change(self, inputs: Any, outputs: Any) -> None:
            del outputs
            self.operator.check([tuple(tensor.dims) for tensor in inputs])

        def get_workspace_size(self, inputs: Any, outputs: Any) -> int:
            del outputs
            return self.operator.workspace_bytes([_largest(tensor) for tensor in inputs])

        def attach_to_context(self, context: Any) -> Any:
            del context
            # Loads the kernels now: enqueue must not.
            return Plugin(self.operator, kernels())

        def get_fields_to_serialize(self) -> Any:
            self.fields = _Fields(trt, self.operator)
            return self.fields.collection

        def get_valid_tactics(self) -> list[int]:
            return []

        def set_tactic(self, tactic: int) -> None:
            del tactic

        def enqueue(
            self,
            input_desc: Sequence[Any],
            output_desc: Sequence[Any],
            inputs: Sequence[int],
            outputs: Sequence[int],
            workspace: int,
            stream: int,
        ) -> None:
            try:
                given = [
                    Tensor(pointer, tuple(desc.dims), names[desc.type])
                    for pointer, desc in zip(inputs, input_desc, strict=True)
                ]
                desc = output_desc[0]
                made = Tensor(outputs[0], tuple(desc.dims), names[desc.type])
                loaded = self.loaded or kernels()
                loaded.launch(self.operator.launches(given, made, workspace), stream)
            except Exception:
                # TensorRT drops the exception's text; it reaches the user through the log only.
                _logger.exception("%s failed on the GPU", self.operator.name)
                raise

    return Plugin


@cache
def _creator_class(trt: Any) -> type:
    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        def __init__(self, operator: type[Operator]) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.operator = operator
            self.name = operator.name
            self.plugin_namespace = NAMESPACE
            self.plugin_version = VERSION
            self.fields = _Fields(trt, operator())
            self.field_names = self.fields.collection

        def create_plugin(self, name: str, collection: Any, phase: Any) -> Any:
            del name, phase
            known = asdict(cast(Any, self.operator()))
            given = {
                field.name: type(known[field.name])(np.asarray(field.data).ravel()[0])
                for field in collection
                if field.name in known
            }
            return make_plugin(trt, cast(Operator, replace(cast(Any, self.operator()), **given)))

    return Creator


class _Fields:
    """Attributes as TensorRT keeps them: int32 and float32 arrays of one element.

    ``PluginFieldCollection`` copies the addresses of names and values and keeps neither, so all of
    them are kept here for as long as TensorRT may read them.
    """

    def __init__(self, trt: Any, operator: Operator) -> None:
        self._arrays, self._fields = [], []
        for field in fields(cast(Any, operator)):
            value = getattr(operator, field.name)
            is_float = isinstance(value, float)
            kind = trt.PluginFieldType.FLOAT32 if is_float else trt.PluginFieldType.INT32
            self._arrays.append(np.array([value], np.float32 if is_float else np.int32))
            self._fields.append(trt.PluginField(field.name, self._arrays[-1], kind))
        self.collection = trt.PluginFieldCollection(self._fields)


def _largest(tensor: Any) -> tuple[int, ...]:
    """Give the shape to plan for: a dynamic dimension is -1 in ``desc`` and bounded in ``max``."""
    return tuple(max(pair) for pair in zip(tensor.desc.dims, tensor.max, strict=True))
