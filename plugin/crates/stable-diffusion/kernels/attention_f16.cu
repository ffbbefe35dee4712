#include "attention.cuh"

HALF_ATTENTION(f16)
