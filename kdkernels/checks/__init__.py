"""Every error a caller can get, raised before anything is launched and before any tensor is touched.

Messages name the argument, what was expected and what came. Values that live in tensors (labels, temperatures) are read
on the CPU, where that costs nothing; on a GPU only when the environment variable ``KDKERNELS_DEBUG=1`` is set, because
reading them waits for the device. Under ``torch.compile`` values are not read at all. The kernels themselves never
read or write out of bounds, whatever the labels.

A caller says ``checks.NAME``; a check stands in the module of its subject. ``sequences``, of caches alone, is imported
by these.
"""

from kdkernels.checks.columns import (
    changes_of_reading,
    class_dimension,
    log_probs_alone,
    not_sharded,
    of_columns,
    rows_are_neighbours,
    same_dims,
)
from kdkernels.checks.dense import (
    cap_of_teacher,
    logits,
    mixture_of,
    mixture_weights,
    no_probabilities,
    one_gradient,
    part_of_teacher,
    probabilities,
    reverse_mode_only,
    several,
    shard,
    shard_of_probabilities,
    student_of,
    teacher_gets_none,
    teacher_like,
    teacher_of_width,
    teacher_probs,
    teacher_shard,
    teachers_of,
    vocabulary,
    why_no_teacher_grad,
    why_not_counted,
    without_teacher,
)
from kdkernels.checks.expectations import expectation, expectation_alone, finite_bias, frozen_head
from kdkernels.checks.hidden import (
    head,
    head_tensors,
    linear_mode_allowed,
    lone_head,
    no_hooks,
    rows_of_head,
    sparse_grad_allowed,
    teacher_callable,
    teacher_chunks,
    teacher_head,
    teacher_shard_head,
)
from kdkernels.checks.memory import apart_in_place, inplace_allowed
from kdkernels.checks.packed import packed_buffer, packed_layout, to_be_packed
from kdkernels.checks.rows import (
    labels_like,
    labels_of,
    normalizer_like,
    per_row,
    reduction_name,
    slots_of_rows,
    token_ids,
    token_mask,
    token_numbers,
)
from kdkernels.checks.sparse import sparse_teacher, tail_like
from kdkernels.checks.tensors import (
    column_dims,
    is_dtensor,
    reads_values,
    same_mesh,
    sharded_argument,
    sharded_student,
    sum_dtype,
    tensor,
    with_slots,
)
from kdkernels.checks.values import (
    choice,
    flag,
    group_of_ranks,
    in_sums,
    integer,
    logits_dtype,
    meant,
    number,
    offsets,
    softcap,
    text,
)
from kdkernels.checks.vectors import attention_mask, attention_operands, features, relation_vectors, sample_mask
