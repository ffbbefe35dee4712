#include "attention.cuh"

HALF_ATTENTION(bf16)
