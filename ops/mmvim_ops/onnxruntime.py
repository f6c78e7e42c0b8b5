"""The kernels of the CPU as custom operators of ONNX Runtime."""

from pathlib import Path

LIBRARY = Path(__file__).parent / '_onnxruntime.so'


def onnxruntime_library() -> str:
    """Path of the library with this package's operators for ONNX Runtime.

    ``SessionOptions.register_custom_ops_library`` takes it, and so does the function of the same
    purpose in other languages. It needs ONNX Runtime 1.17 or later and nothing of this package, so
    that the file alone can be copied to where the model runs.

    Returns:
        str: The path.

    Raises:
        RuntimeError: It was not compiled when the package was installed.
    """
    if not LIBRARY.exists():
        from .backends.cpp.library import BUILD_COMMAND

        raise RuntimeError(
            'the library for ONNX Runtime is not compiled; in the source tree, run: '
            f'{BUILD_COMMAND}'
        )
    return str(LIBRARY)
