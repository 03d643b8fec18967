#include "topk_kernels.h"
