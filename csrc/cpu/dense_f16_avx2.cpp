#define KDK_STUDENT Half
#include "dense_of_one_type.h"
