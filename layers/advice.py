"""What to write instead of a function that the tracer refuses."""

# advice -> names of the refused functions that it helps with
ADVICE_FOR = {
    "use BatchNorm, whose statistics are constant in eval mode": ("instance_norm", "layer_norm", "group_norm"),
    "the indices of the maxima are not supported, use conv_transpose2d to go back up": (
        *("max_pool1d_with_indices", "max_pool2d_with_indices"),
        *("adaptive_max_pool1d_with_indices", "adaptive_max_pool2d_with_indices"),
    ),
    "use an average or a max pooling: a neuron sends no powers of its input": ("lp_pool1d", "lp_pool2d", "lp_pool3d"),
    "use a max pooling of fixed windows": ("fractional_max_pool2d", "fractional_max_pool2d_with_indices"),
    "a network's path must not depend on the values of its activations; relu, clamp, maximum and minimum with a "
    "constant choose some of them": (
        *("bool", "item", "tolist", "int", "float", "index", "nonzero", "where"),
        *("eq", "ne", "lt", "le", "gt", "ge", "allclose", "equal", "argmax", "argmin", "topk", "sort"),
    ),
    "keep the computation in torch": ("numpy", "array"),
    "write it with slices, index_select or a permutation, whose places are constants": (
        *("take_along_dim", "gather", "take", "masked_select", "rot90", "as_strided", "slice"),
    ),
    "write it without assigning to parts, with torch.cat or F.pad": (
        *("setitem", "index_put", "index_copy", "index_fill", "masked_fill", "scatter"),
    ),
    "the product with a constant weight is a linear layer, F.linear(x, weight.t()); a product of two activations "
    "cannot be computed by spikes": (
        *("matmul", "rmatmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "dot", "inner", "bilinear"),
    ),
    "it moves the channels to the end; over the channels a product is a 1x1 convolution, "
    "F.conv2d(x, weight.t()[:, :, None, None]), of flattened values a linear layer": ("tensordot",),
    "leave it out, a network is traced in one type": ("half", "bfloat16", "double", "type"),
    "spikes compute no product or quotient of two activations, only with constants: use a network without gates "
    "(squeeze-and-excitation, attention), or replace those of one factor for each channel (--replace_gates mean); "
    "write x * sigmoid(x) as F.silu(x)": (
        *("mul", "multiply", "rmul", "imul", "div", "divide", "true_divide", "truediv", "itruediv"),
        *("addcmul", "addcdiv", "square", "floor_divide", "remainder"),
    ),
    "leave fake quantization and its observers out; a rounding written as round(clamp(x / s, 0, n)) * s converts": (
        *("fake_quantize_per_tensor_affine", "fake_quantize_per_channel_affine", "aminmax"),
        *("fused_moving_avg_obs_fake_quant", "fake_quantize_learnable_per_tensor_affine"),
    ),
    "spikes compute no quotient by an activation": ("rdiv", "rtruediv", "reciprocal"),
}
ADVICE = {name: advice for advice, names in ADVICE_FOR.items() for name in names}
