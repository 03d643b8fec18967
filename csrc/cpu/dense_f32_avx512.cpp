#define KDK_STUDENT float
#define KDK_ROWS_IN_F32 template
#include "dense_of_one_type.h"
