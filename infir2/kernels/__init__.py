"""Tensors in, tensors out. One file an operation: its plain-torch twin defines the numbers and runs anywhere.

Beside it ``NAME_triton`` holds the kernels that give them on a GPU, imported only when CUDA tensors are met.

    FP8         reference (what FP8 means here), operand (how it lies in memory), quantize, row_codes, transpose,
                matmul, split_k (GEMMs of few rows), fidelity
    layers      norm, add_norm, rotary, rotary_qkv (training), rotary_qkv_cache (decoding), swiglu
    attention   paged_layout, paged_attention; on a GPU paged_attention_triton (prompts), paged_decode_triton (decoding)
    losses      logit_chunks, cross_entropy, logprob
    sampling    sample, sample_filter (top-k, top-p), split_mix (random numbers)
    optimiser   adamw, rounding
    machinery   custom_op (for torch.compile), dispatch (kernels without a backward pass), dependent_launch,
                codes_triton (what kernels share of making FP8 codes)
"""
