"""The ATen operations that a program may hold, by name; all functional overloads of each, and their in-place forms.

What is not here: operations that draw random numbers, read memory that nobody wrote (`empty`), take storage apart
(`as_strided`, `set_`, `resize_`), give sizes or Python values that depend on what a tensor holds (`nonzero`, `item`),
reach files, devices, processes or global state, and the internals of other front ends (`*_backward`, `_foreach_*`,
quantized, sparse, nested, cudnn).
"""

from __future__ import annotations

import re

_NAMES = """
abs absolute acos acosh adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
adaptive_max_pool2d adaptive_max_pool3d add addbmm addcdiv addcmul addmm addmv addr adjoint affine_grid_generator
alias all amax amin aminmax angle any arange arccos arccosh arcsin arcsinh arctan arctan2 arctanh argmax argmin
argsort asin asinh atan atan2 atanh atleast_1d atleast_2d atleast_3d avg_pool1d avg_pool2d avg_pool3d
baddbmm batch_norm bilinear bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor
block_diag bmm broadcast_tensors broadcast_to bucketize
cartesian_prod cat cdist ceil celu channel_shuffle chunk clamp clamp_max clamp_min clip clone col2im column_stack
complex concat concatenate conj conj_physical constant_pad_nd contiguous conv1d conv2d conv3d conv_transpose1d
conv_transpose2d conv_transpose3d convolution _convolution copy copysign cos cosh cosine_similarity count_nonzero
cross cummax cummin cumprod cumsum
deg2rad detach diag diag_embed diagflat diagonal diff div divide dot dropout dsplit dstack
einsum elu embedding eq erf erfc erfinv exp exp2 expand expand_as expm1 eye
feature_dropout fft_fft fft_fft2 fft_fftfreq fft_fftn fft_fftshift fft_ifft fft_ifft2 fft_ifftn fft_ifftshift
fft_irfft fft_irfft2 fft_irfftn fft_rfft fft_rfft2 fft_rfftfreq fft_rfftn fill fix flatten flip fliplr flipud
float_power floor floor_divide fmax fmin fmod frac full full_like
gather gcd ge gelu ger glu greater greater_equal grid_sampler grid_sampler_2d grid_sampler_3d group_norm gt
hann_window hardshrink hardsigmoid hardswish hardtanh heaviside hsplit hstack hypot
i0 im2col imag index index_add index_copy index_fill index_put index_select inner instance_norm isclose isfinite
isin isinf isnan isneginf isposinf isreal
kron
layer_norm ldexp le leaky_relu lerp less less_equal lgamma lift lift_fresh lift_fresh_copy linalg_cross linalg_det
linalg_inv linalg_matmul linalg_matrix_norm linalg_multi_dot linalg_norm linalg_qr linalg_vecdot linalg_vector_norm
linear linspace log log10 log1p log2 log_sigmoid log_softmax logaddexp logaddexp2 logcumsumexp logical_and logical_not
logical_or logical_xor logit logspace logsumexp lt
mH mT masked_fill masked_scatter matmul matrix_H max max_pool1d max_pool2d max_pool2d_with_indices max_pool3d
maximum mean median meshgrid min minimum mish mm moveaxis movedim msort mul multiply mv
nan_to_num nanmean nansum narrow native_group_norm native_layer_norm ne neg negative new_full new_ones new_zeros
norm not_equal numpy_T
one_hot ones ones_like outer
pad pairwise_distance permute pixel_shuffle pixel_unshuffle polar positive pow prelu prod
rad2deg ravel real reciprocal reflection_pad1d reflection_pad2d reflection_pad3d relu relu6 remainder renorm repeat
repeat_interleave replication_pad1d replication_pad2d replication_pad3d reshape reshape_as resolve_conj resolve_neg
rms_norm _fused_rms_norm roll rot90 round rsqrt rsub
_safe_softmax scalar_tensor scaled_dot_product_attention scatter scatter_add scatter_reduce searchsorted select
select_scatter selu sgn sigmoid sign signbit silu sin sinc sinh slice slice_scatter slow_conv3d softmax _softmax
_log_softmax softplus softshrink sort special_entr special_erf special_erfc special_exp2 special_expit special_expm1
special_gammaln special_i0 special_log1p special_log_softmax special_logit special_logsumexp special_round
special_sinc special_softmax special_xlog1py split split_with_sizes sqrt square squeeze stack std std_mean sub
subtract sum sum_to_size swapaxes swapdims sym_numel sym_size sym_stride
t take take_along_dim tan tanh tensor_split tensordot threshold tile to _to_copy topk trace transpose tril
tril_indices triu triu_indices true_divide trunc type_as
unbind unflatten unfold unsafe_chunk unsafe_split unsafe_split_with_sizes _unsafe_view unsqueeze
_upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_nearest_exact1d _upsample_nearest_exact2d
_upsample_nearest_exact3d upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d
upsample_nearest2d upsample_nearest3d upsample_trilinear3d
var var_mean vdot view view_as view_as_complex view_as_real vsplit vstack
_weight_norm where xlogy
zero zeros zeros_like
"""
FUNCTIONAL = frozenset(re.findall(r"\w+", _NAMES))

# Check something and have no value: in captured programs alone.
ASSERTIONS = (
    "_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size",
)  # fmt: skip

# Memory that nobody wrote holds what was there before. Programs read zeros in its place.
ZEROED = {
    "empty.memory_format": "zeros.default",
    "empty_like.default": "zeros_like.default",
    "new_empty.default": "new_zeros.default",
}

# Operations that would draw random numbers for other values of these operands.
DETERMINISTIC: dict[str, dict[str, float | bool]] = {
    "dropout": {"train": False},
    "feature_dropout": {"train": False},
    "scaled_dot_product_attention": {"dropout_p": 0.0},
}
