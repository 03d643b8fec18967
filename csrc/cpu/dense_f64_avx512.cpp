#define KDK_STUDENT double
#include "dense_of_one_type.h"
#include "exact_row.h"
