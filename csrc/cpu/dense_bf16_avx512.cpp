#define KDK_STUDENT BFloat16
#include "dense_of_one_type.h"
