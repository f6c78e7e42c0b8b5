"""Writing a part of a model to a file, and running such a file."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from mmvim.utils.errors import UserError
from mmvim_ops import onnxruntime_library, use_backend

from .parts import Part

__all__ = ['FORMATS', 'export', 'load']

#: Formats and the ends of their files' names.
FORMATS = {'onnx': '.onnx', 'torch-export': '.pt2', 'aoti': '.pt2'}
OPSET = 18


def export(
    part: Part,
    path: str | Path,
    file_format: str,
    shape: tuple[int, int],
    batch_size: int = 1,
    dynamic: bool = False,
    custom_op: bool = False,
) -> None:
    """Write a part of a model to a file.

    Args:
        part (Part): See :func:`~mmvim.deployment.part_of`.
        path (str | Path): The file.
        file_format (str): ``'onnx'``: standard operators of opset 18 only, the scans as ONNX
            ``Scan``. ``'torch-export'``: a program that ``torch.export.load`` reads. ``'aoti'``: a
            package compiled by AOTInductor for this kind of machine. The last two call this
            project's kernels: a process that loads them imports ``mmvim_ops`` first.
        shape (tuple[int, int]): Height and width of the pictures.
        batch_size (int): Pictures in a call.
        dynamic (bool): Take any batch size, and heights and widths from 4 patches on (with
            ``'aoti'`` multiples of the patches' stride); ``shape`` and ``batch_size`` then say
            nothing.
        custom_op (bool): With ``'onnx'``: the scans and convolutions as operators of
            :func:`mmvim_ops.onnxruntime_library`, which ONNX Runtime then needs; faster.

    Raises:
        ValueError: ``file_format`` is none of these, or has no custom operators.
        UserError: What it needs is missing, or the model does not trace.
    """
    if file_format not in FORMATS:
        raise ValueError(f'file_format must be one of {", ".join(FORMATS)}, got {file_format!r}')
    if custom_op and file_format != 'onnx':
        raise ValueError(f"custom_op is for file_format 'onnx', got {file_format!r}")
    if file_format == 'onnx':
        _need_onnx()
        if custom_op:
            _custom_op_library()
        # The operators of other backends have no translation.
        part, backend = part.of_operations(), use_backend('cpp' if custom_op else 'torch')
    else:
        backend = nullcontext()
    # Inductor of torch 2.13 cannot order strides that are products of rounded quotients.
    multiples = file_format == 'aoti'
    with torch.no_grad(), backend:
        program = _trace(part, shape, batch_size, dynamic, multiples)
        if file_format == 'onnx':
            _write_onnx(program, part, Path(path), custom_op)
        elif file_format == 'torch-export':
            torch.export.save(program, path)
        else:
            _compile(program, Path(path))


def _trace(
    part: Part, shape: tuple[int, int], batch_size: int, dynamic: bool, multiples: bool
) -> ExportedProgram:
    """The program; ``multiples`` allows sides of a dynamic one that are whole patches only."""
    device = next(part.parameters()).device
    sizes = None
    if dynamic:
        # Torch takes sizes of 1 for constants: maps of stride 2 times the patches' stay above it.
        least = 4 * part.stride
        shape = (least + part.stride, least + 2 * part.stride)
        batch_size = 2
        sides = {}
        for index, name in ((2, 'height'), (3, 'width')):
            if multiples:
                sides[index] = part.stride * Dim(f'{name}_patches', min=4, max=1 << 12)
            else:
                sides[index] = Dim(name, min=least, max=1 << 16)
        sizes = ({0: Dim('batch', max=1 << 16), **sides},)
    images = torch.rand(batch_size, 3, *shape, device=device) * 255
    try:
        return torch.export.export(part, (images,), dynamic_shapes=sizes, strict=False)
    except Exception as error:
        advice = ': export it without --dynamic' if dynamic else ''
        raise UserError(
            f'torch.export does not trace the model{advice} '
            f'({type(error).__name__}: {str(error).strip().splitlines()[0]})'
        ) from error


def _need_onnx() -> None:
    missing = [name for name in ('onnx', 'onnxscript') if find_spec(name) is None]
    if missing:
        raise UserError(
            f'--format onnx needs {" and ".join(missing)}: pip install onnx onnxscript onnxruntime'
        )
    if 'custom_translation_table' not in inspect.signature(torch.onnx.export).parameters:
        raise UserError(f'--format onnx needs torch 2.6 or later, got {torch.__version__}')


def _custom_op_library() -> str:
    try:
        return onnxruntime_library()
    except RuntimeError as error:
        raise UserError(str(error)) from error


def _write_onnx(program: ExportedProgram, part: Part, path: Path, custom_op: bool) -> None:
    if custom_op:
        from .onnx_custom import TRANSLATIONS
    else:
        from .onnx_scan import TRANSLATIONS

    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of torch's own code, about itself
        result = torch.onnx.export(
            program,
            dynamo=True,
            custom_translation_table=TRANSLATIONS,
            input_names=['images'],
            output_names=list(part.names),
            opset_version=OPSET,
            verbose=False,
        )
    result.save(path)


def _compile(program: ExportedProgram, path: Path) -> None:
    package = getattr(torch._inductor, 'aoti_compile_and_package', None)
    if package is None or 'args' in inspect.signature(package).parameters:
        raise UserError(f'--format aoti needs torch 2.6 or later, got {torch.__version__}')
    package(program, package_path=str(path))


def load(
    path: str | Path, file_format: str, custom_op: bool = False
) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """A function of pictures (B, 3, H, W) that runs an exported file; outputs as of the part.

    Args:
        path (str | Path): The file.
        file_format (str): As it was exported.
        custom_op (bool): As it was exported.

    Raises:
        UserError: onnxruntime or the library of custom operators is needed and not there.
    """
    if file_format == 'onnx':
        return _load_onnx(str(path), custom_op)
    if file_format == 'torch-export':
        run = torch.export.load(path).module()
    else:
        run = torch._inductor.aoti_load_package(str(path))

    def call(images: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return tuple(run(images))

    return call


def _load_onnx(path: str, custom_op: bool) -> Callable[[Tensor], tuple[Tensor, ...]]:
    if find_spec('onnxruntime') is None:
        raise UserError('running an ONNX file needs onnxruntime: pip install onnxruntime')
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    if custom_op:
        options.register_custom_ops_library(_custom_op_library())
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])

    def call(images: Tensor) -> tuple[Tensor, ...]:
        outputs = session.run(None, {'images': images.cpu().numpy()})
        return tuple(torch.from_numpy(np.asarray(output)) for output in outputs)

    return call
