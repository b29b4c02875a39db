from libc.stdint cimport int64_t

from .arrays cimport Array, Space

cdef int check_shape(Array array, str name, str symbols, int64_t d0, int64_t d1=*, int64_t d2=*) except -1
cdef int check_device(Array array, str name, Array other, str other_name) except -1
cdef int check_dtype(Array array, str name, tuple allowed) except -1
cdef int check_widths(Array array, str name, str symbols) except -1
cdef int check_apart(Array out, str name, Array other, str other_name) except -1
cdef int check_floating(Array array, str name) except -1
cdef int check_like(Array array, str name, Array other, str other_name) except -1
cdef int check_rows(int64_t num_tokens, int64_t top_k) except -1
cdef int check_sums(object obj, Array out, str name, Array other, str other_name) except -1
cdef int check_writable(object obj, Array array, str name) except -1
cdef int check_output(object obj, Array out, str name, Array other, str other_name) except -1
cdef Array output_of(Space space, object out, str name, tuple shape, Array like, str like_name)
cdef Array bias_of(object expert_bias, int64_t num_experts, Array x)
cdef Array mask_of(object valid_mask, int64_t num_tokens, Array x)
cdef int router_dtype(Array x) noexcept
cdef int check_finite(Space space, Array logits) except -1
