"""The schemas of the operators, once for all backends: ``mmvim_ops::<backend>_<operation>``.

The build loads this file, too: the compiled library defines its operators by them
(:func:`cpp_header`), so that a program without Python finds them, and is marked with
:func:`interface`. It must not import torch.
"""

import hashlib

_SCAN = (
    'Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, '
    'Tensor? delta_bias, '
)
_BIDIRECTIONAL = (
    'Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias, '
    'Tensor u_b, Tensor delta_b, Tensor A_b, Tensor B_b, Tensor C_b, Tensor? D_b, '
    'Tensor? delta_bias_b, Tensor? z, '
)
_CONV1D = 'Tensor x, Tensor weight, Tensor? bias, bool silu, bool reverse'
_MIXER = (
    'Tensor tokens, Tensor? norm_weight, Tensor in_weight, Tensor? in_bias, Tensor out_weight, '
    'Tensor? out_bias, '
    'Tensor conv_weight, Tensor? conv_bias, Tensor x_proj, Tensor dt_proj, Tensor dt_bias, '
    'Tensor A, Tensor? D, Tensor? conv_weight_b, Tensor? conv_bias_b, Tensor? x_proj_b, '
    'Tensor? dt_proj_b, Tensor? dt_bias_b, Tensor? A_b, Tensor? D_b, int[] reversed, '
    'float scale, float norm_eps, '
)

SCHEMAS = {
    # out, last_state, checkpoints: the states between segments if `save`, else empty
    'scan': f'({_SCAN}bool delta_softplus, bool reverse, bool save) -> (Tensor, Tensor, Tensor)',
    # gradients of the tensors, empty ones of those that were not given; as in all that follow
    'scan_backward': f'(Tensor grad_out, Tensor? grad_last_state, {_SCAN}Tensor checkpoints, '
    'bool delta_softplus, bool reverse) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, '
    'Tensor, Tensor)',
    # out, checkpoints of both directions
    'bidirectional_scan': f'({_BIDIRECTIONAL}bool delta_softplus, float scale, bool save) -> '
    '(Tensor, Tensor, Tensor)',
    'bidirectional_scan_backward': f'(Tensor grad_out, {_BIDIRECTIONAL}Tensor checkpoints, '
    'Tensor checkpoints_b, bool delta_softplus, float scale) -> Tensor[]',
    'scan_segment': f'({_SCAN}Tensor(a!) state, Tensor(b!) out, bool delta_softplus, bool reverse, '
    'bool accumulate, float scale) -> ()',
    'linear': '(Tensor x, Tensor weight, Tensor? bias) -> Tensor',
    'conv1d': f'({_CONV1D}) -> Tensor',
    'conv1d_backward': f'(Tensor grad_out, {_CONV1D}) -> (Tensor, Tensor, Tensor)',
    # out, in_proj's output, saved states of both directions
    'mamba_mixer': f'({_MIXER}int save) -> (Tensor, Tensor, Tensor, Tensor)',
    # without gradients, in and to half precision
    'mamba_mixer_half': f'({_MIXER}ScalarType dtype) -> Tensor',
    'mamba_mixer_backward': f'(Tensor grad_out, {_MIXER}Tensor xz, Tensor states, '
    'Tensor states_b) -> Tensor[]',
}


def cpp_header() -> str:
    """What ``csrc/cpu/definitions.cpp`` includes: every schema with the operator's name."""
    lines = [f'    "cpp_{name}{schema}",' for name, schema in SCHEMAS.items()]
    return '\n'.join(['constexpr const char* kSchemas[] = {', *lines, '};', ''])


def interface() -> str:
    """Changes whenever a schema does."""
    return hashlib.sha256(cpp_header().encode()).hexdigest()[:16]


def library_interface(torch_version: str) -> str:
    """Of a library that uses this torch; torch's minor versions store tensors differently."""
    return f'{interface()} torch {".".join(torch_version.split(".")[:2])}'
