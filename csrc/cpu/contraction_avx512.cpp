#include "contraction_isa.h"
