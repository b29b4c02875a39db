/* swiglu, geglu (tanh) and relu_squared with their gradients, for float32 and float64. */
#ifndef FFMOE_ACTIVATION_H
#define FFMOE_ACTIVATION_H

#include <float.h>

#include "exp.h"

enum { FFMOE_SWIGLU, FFMOE_GEGLU, FFMOE_RELU_SQUARED };

#define REAL float
#define REAL_MAX FLT_MAX
#define NAME(stem) ffmoe_##stem##_f32
#include "glu.h"
#undef REAL
#undef REAL_MAX
#undef NAME

#define REAL double
#define REAL_MAX DBL_MAX
#define NAME(stem) ffmoe_##stem##_f64
#include "glu.h"
#undef REAL
#undef REAL_MAX
#undef NAME

#endif
