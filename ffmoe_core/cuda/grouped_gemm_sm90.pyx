"""Grouped products on Hopper: variants and arguments.

The kernels are in kernels/grouped_gemm_sm90.cu and, those whose warpgroups take turns, grouped_gemm_turns_sm90.cu.
"""

from libc.stdint cimport int64_t, uintptr_t
from libc.stdlib cimport getenv

from ..arrays cimport BFLOAT16, FLOAT16, FLOAT32, INT32, Array, Space
from .launch cimport Parameter, compute_capability, kernel, multiprocessor_count, set_words
from .tensor_map cimport TensorMap, map_halves, map_matrices

cdef str FILE = "grouped_gemm_sm90.cu"
cdef str TURNS_FILE = "grouped_gemm_turns_sm90.cu"
# The same as in the kernels.
cdef enum:
    CLUSTER = 2
    THREADS = 384
    OWN = 128     # rows or columns of a block's own operand
    SHARED = 256  # and of the one it shares with the other block
    DEPTH = 64
    STAGES = 4
    STORED = 16   # rows of what a warp stores as one
    TURNS_COLUMNS = 192  # in the place of SHARED where warpgroups take turns
    MOST_GROUPS = 1024
    COUNTERS = 16  # a layer's backward wants at most 8
    QUEUE_BYTES = 16 * (8 + 4)
    # the stages, the spare buffers, then struct Shared: barriers, rows, the queue and the list of tiles
    STAGES_BYTES = STAGES * (OWN + SHARED) * DEPTH * 2
    BUFFERS_BYTES = 2 * 64 * 64 * 2
    BARRIERS_BYTES = STAGES * 2 * 8
    TILES_BYTES = (3 * MOST_GROUPS + 4) * 4
    SHARED_BYTES = STAGES_BYTES + BUFFERS_BYTES + BARRIERS_BYTES + STAGES * DEPTH * 4 + QUEUE_BYTES + TILES_BYTES
    # the same where warpgroups take turns; each of their warps has three buffers
    TURNS_STAGES_BYTES = STAGES * (OWN + TURNS_COLUMNS) * DEPTH * 2
    TURNS_BUFFERS_BYTES = 2 * 4 * 3 * STORED * 64 * 2
    TURNS_SHARED_BYTES = TURNS_STAGES_BYTES + TURNS_BUFFERS_BYTES + BARRIERS_BYTES + QUEUE_BYTES + TILES_BYTES

cdef tuple TYPES = (<int>BFLOAT16, <int>FLOAT16)

# --- variants: what each kernel is compiled with, by dtype and then the kernel's own choice ---

cdef dict _gemm = {
    (x, gather, transpose_b): (f"X_TYPE={x}", "SHARE_A=0", f"GATHER={gather}", f"TRANSPOSE_B={transpose_b}")
    for x in TYPES
    for gather in (0, 1)
    for transpose_b in (0, 1)
}
cdef dict _gemm_in_turns = {
    (x, transpose_b): (f"X_TYPE={x}", f"TRANSPOSE_B={transpose_b}") for x in TYPES for transpose_b in (0, 1)
}
cdef dict _wgrad = {
    (x, out, accumulate, share_a, gather): (
        f"X_TYPE={x}", f"SHARE_A={share_a}", f"GATHER={gather}", "WGRAD=1", f"OUT_TYPE={out}",
        f"ACCUMULATE={accumulate}",
    )
    for x in TYPES
    for out in (x, <int>FLOAT32)
    for accumulate in (0, 1)
    for share_a, gather in ((0, 0), (0, 1), (1, 1))
}
cdef dict _glu = {
    (x, gather, act): (f"X_TYPE={x}", "SHARE_A=0", f"GATHER={gather}", "GLU=1", f"ACTIVATION={act}")
    for x in TYPES
    for gather in (0, 1)
    for act in range(3)
}
cdef dict _glu_backward = {
    (x, gather, act): (f"X_TYPE={x}", "SHARE_A=0", f"GATHER={gather}", "GLU_BACKWARD=1", f"ACTIVATION={act}")
    for x in TYPES
    for gather in (0, 1)
    for act in range(3)
}


def variants():
    """Every (file, entry, defines) that this module can launch."""
    cdef dict table
    return [
        (file, entry, defines)
        for file, entry, table in (
            (FILE, "grouped_gemm", _gemm), (TURNS_FILE, "grouped_gemm", _gemm_in_turns),
            (FILE, "grouped_gemm_wgrad", _wgrad), (FILE, "grouped_glu", _glu),
            (FILE, "grouped_glu_backward", _glu_backward),
        )
        for defines in table.values()
    ]


# --- choosing and counting ---

cdef bint runs_on(int device, int64_t num_groups) except -1:
    """Whether these kernels run on a device, with so many groups.

    FFMOE_PORTABLE_KERNELS in the environment keeps to the kernels that run on every architecture.
    """
    return (
        num_groups <= MOST_GROUPS
        and compute_capability(device) == 90
        and getenv("FFMOE_PORTABLE_KERNELS") == NULL
    )


cdef bint serves(int dtype, uintptr_t addresses, int64_t widths, int64_t num_groups, int device) except -1:
    """Whether they can do a product: its arrays' addresses and its widths are or-ed together."""
    return (
        (dtype == BFLOAT16 or dtype == FLOAT16)
        and widths % 8 == 0
        and addresses % 16 == 0
        and runs_on(device, num_groups)
    )


cdef int divided_up(int64_t value, int64_t by) noexcept:
    return <int>((value + by - 1) // by)


cdef uintptr_t address(Array array) noexcept:
    return <uintptr_t>array.data if array is not None else 0


cdef Array counter_for(Space space, bint wanted):
    """What the blocks of a kernel count in while they run, zero before it; or None.

    Zeros come for several kernels at once: setting memory between two of them would keep them apart.
    """
    if not wanted:
        return None
    cdef unsigned int zero = 0
    if space.zeros_left == 0:
        space.zeros = space.empty((COUNTERS,), INT32)
        set_words(space.device_id, <uintptr_t>space.zeros.data, &zero, 1, COUNTERS, space.stream)
        space.zeros_left = COUNTERS
    space.zeros_left -= 1
    return space.zeros.at(4 * space.zeros_left, (1,), INT32)


cdef int cluster_count(Space space) except -1:
    """A block stays until its tiles are done: one that finds no place at first would begin when the others end."""
    return max((multiprocessor_count(space.device_id) - space.spared) // CLUSTER, 1)


cdef bint has_more(Space space, int64_t num_rows, int64_t num_groups, int64_t column_tiles) except -1:
    """Whether some cluster may have a second tile of a product of rows: then they are drawn."""
    return (num_rows // (CLUSTER * OWN) + num_groups + 1) * column_tiles > cluster_count(space)


cdef int launch(
    Space space, str entry, tuple defines, void** params, str file=FILE, unsigned int shared_bytes=SHARED_BYTES
) except -1:
    cdef unsigned int blocks = cluster_count(space) * CLUSTER
    return kernel(file, entry, defines, space.device_id, shared_bytes).launch(
        blocks, 1, 1, THREADS, shared_bytes, space.stream, params
    )


# --- stages ---


cdef int grouped_gemm(
    Space space, Array a, Array b, Array expert_offsets, Array row_index, bint transpose_b, Array out,
    bint paced, int chunks, int chunk,
) except -1:
    cdef int num_groups = <int>b.dims[0], num_rows = <int>out.dims[0]
    cdef int depth = <int>a.dims[1], columns = <int>out.dims[1], column_tiles = divided_up(columns, SHARED)
    cdef bint gather = row_index is not None
    cdef uintptr_t index = address(row_index)
    cdef TensorMap a_map, b_map, out_map
    map_matrices(&a_map, a, 1, a.dims[0], depth, OWN)
    map_matrices(&out_map, out, 1, num_rows, columns, STORED)
    map_matrices(&b_map, b, num_groups, b.dims[1], b.dims[2], SHARED // 2 if transpose_b else DEPTH)
    cdef Array announced = counter_for(space, paced)
    cdef Array taken = counter_for(space, has_more(space, num_rows, num_groups, column_tiles))
    cdef uintptr_t due = address(announced), drawn = address(taken)
    cdef Parameter[16] params = [
        &a.data, a_map.at, b_map.at, out_map.at, &expert_offsets.data, &index, &out.data,
        &num_groups, &num_rows, &chunks, &chunk, &depth, &columns, &column_tiles, &due, &drawn,
    ]
    return launch(space, "grouped_gemm", _gemm[a.dtype, gather, transpose_b], params)


cdef int grouped_gemm_in_turns(
    Space space, Array a, Array b, Array expert_offsets, bint transpose_b, Array out, bint paced,
    int chunks, int chunk,
) except -1:
    cdef int num_groups = <int>b.dims[0], num_rows = <int>out.dims[0]
    cdef int depth = <int>a.dims[1], columns = <int>out.dims[1]
    cdef int column_tiles = divided_up(columns, TURNS_COLUMNS)
    cdef TensorMap a_map, b_map, out_map
    map_matrices(&a_map, a, 1, a.dims[0], depth, OWN)
    map_matrices(&out_map, out, 1, num_rows, columns, STORED)
    map_matrices(
        &b_map, b, num_groups, b.dims[1], b.dims[2], (TURNS_COLUMNS if transpose_b else DEPTH) // CLUSTER
    )
    cdef Array announced = counter_for(space, paced)
    cdef Array taken = counter_for(space, has_more(space, num_rows, num_groups, column_tiles))
    cdef uintptr_t due = address(announced), drawn = address(taken)
    cdef Parameter[14] params = [
        a_map.at, b_map.at, out_map.at, &expert_offsets.data, &out.data,
        &num_groups, &num_rows, &chunks, &chunk, &depth, &columns, &column_tiles, &due, &drawn,
    ]
    return launch(
        space, "grouped_gemm", _gemm_in_turns[a.dtype, transpose_b], params, TURNS_FILE, TURNS_SHARED_BYTES
    )


cdef int grouped_gemm_wgrad(
    Space space, Array a, Array b, Array expert_offsets, Array a_index, Array b_index, Array out,
    bint accumulate, double scale, int chunks=1,
) except -1:
    cdef int num_groups = <int>out.dims[0], a_columns = <int>out.dims[1], b_columns = <int>out.dims[2]
    cdef bint share_a = b_index is not None, gather = share_a or a_index is not None
    cdef uintptr_t index = address(b_index if share_a else a_index)
    cdef int row_tiles = divided_up(a_columns, SHARED), column_tiles = divided_up(b_columns, SHARED)
    cdef TensorMap a_map, b_map, out_map
    map_matrices(&a_map, a, 1, a.dims[0], a_columns, DEPTH)
    map_matrices(&b_map, b, 1, b.dims[0], b_columns, DEPTH)
    out_map.at = a_map.at  # float32 and sums are not stored by the copy engine
    if out.dtype == a.dtype and not accumulate:
        map_matrices(&out_map, out, num_groups, a_columns, b_columns, STORED)
    # what clusters draw their tiles from, if one has a second
    cdef int64_t tiles = <int64_t>num_groups * row_tiles * column_tiles
    cdef Array counter = counter_for(space, tiles > cluster_count(space))
    cdef uintptr_t drawn = address(counter)
    cdef Parameter[16] params = [
        &a.data, a_map.at, &b.data, b_map.at, out_map.at, &expert_offsets.data, &index, &out.data,
        &num_groups, &chunks, &a_columns, &b_columns, &row_tiles, &column_tiles, &scale, &drawn,
    ]
    return launch(
        space, "grouped_gemm_wgrad", _wgrad[a.dtype, out.dtype, accumulate, share_a, gather], params
    )


cdef int grouped_glu(
    Space space, Array x, Array w_up, Array expert_offsets, Array row_index, int act, Array z, Array a,
    bint paced, int chunks, int chunk,
) except -1:
    cdef int num_groups = <int>w_up.dims[0], num_rows = <int>a.dims[0], depth = <int>x.dims[1]
    cdef int intermediate = <int>a.dims[1], column_tiles = divided_up(intermediate, SHARED // 2)
    cdef bint gather = row_index is not None
    cdef uintptr_t index = address(row_index), kept = address(z)
    cdef TensorMap x_map, w_map, z_map, a_map
    map_matrices(&x_map, x, 1, x.dims[0], depth, OWN)
    map_matrices(&w_map, w_up, 2 * num_groups, intermediate, depth, SHARED // 2)
    map_matrices(&a_map, a, 1, num_rows, intermediate, STORED)
    z_map.at = a_map.at
    if z is not None:
        map_halves(&z_map, z, num_rows, intermediate, STORED)
    cdef Array announced = counter_for(space, paced)
    cdef Array taken = counter_for(space, has_more(space, num_rows, num_groups, column_tiles))
    cdef uintptr_t due = address(announced), drawn = address(taken)
    cdef Parameter[18] params = [
        &x.data, x_map.at, w_map.at, z_map.at, a_map.at, &expert_offsets.data, &index, &kept, &a.data,
        &num_groups, &num_rows, &chunks, &chunk, &depth, &intermediate, &column_tiles, &due, &drawn,
    ]
    return launch(space, "grouped_glu", _glu[x.dtype, gather, act], params)


cdef int grouped_glu_backward(
    Space space, Array dout, Array w_down, Array expert_offsets, Array row_index, Array row_weights,
    Array z, int act, Array dz, Array pa, Array parts,
    bint paced, int chunks, int chunk,
) except -1:
    cdef int num_groups = <int>w_down.dims[0], num_rows = <int>pa.dims[0], depth = <int>dout.dims[1]
    cdef int intermediate = <int>pa.dims[1], column_tiles = divided_up(intermediate, PART_COLUMNS)
    cdef bint gather = row_index is not None
    cdef uintptr_t index = address(row_index)
    cdef TensorMap dout_map, w_map, z_map, dz_map, pa_map
    map_matrices(&dout_map, dout, 1, dout.dims[0], depth, OWN)
    map_matrices(&w_map, w_down, num_groups, depth, intermediate, DEPTH)
    map_halves(&z_map, z, num_rows, intermediate, OWN)
    map_halves(&dz_map, dz, num_rows, intermediate, STORED)
    map_matrices(&pa_map, pa, 1, num_rows, intermediate, STORED)
    cdef Array announced = counter_for(space, paced)
    cdef Array taken = counter_for(space, has_more(space, num_rows, num_groups, column_tiles))
    cdef uintptr_t due = address(announced), drawn = address(taken)
    cdef Parameter[21] params = [
        &dout.data, dout_map.at, w_map.at, z_map.at, dz_map.at, pa_map.at, &expert_offsets.data, &index,
        &row_weights.data, &dz.data, &pa.data, &parts.data, &num_groups, &num_rows, &chunks, &chunk, &depth,
        &intermediate, &column_tiles, &due, &drawn,
    ]
    return launch(space, "grouped_glu_backward", _glu_backward[dout.dtype, gather, act], params)
