"""What a collated batch says about its supervised positions."""

import torch

from lit_llm.data.batch import DistillationBatch, collate_pairs, collate_tokens


def test_supervised_positions_predict_the_answer_tokens():
    batch = collate_tokens([[5, 6, 7, 8], [9, 10, 11]], [2, 1], pad_id=0)
    assert batch.ids_BL.tolist() == [[5, 6, 7, 8], [9, 10, 11, 0]]
    assert batch.length_B.tolist() == [4, 3]
    assert batch.target_T.tolist() == [7, 8, 10, 11]
    assert batch.position_T.tolist() == [1, 2, 4, 5]
    assert batch.sequence_T.tolist() == [0, 0, 1, 1]
    assert batch.num_supervised == 4


def test_without_a_prompt_everything_but_the_first_token_is_supervised():
    batch = collate_tokens([[5, 6, 7]], [0], pad_id=0)
    assert batch.target_T.tolist() == [6, 7]
    assert batch.position_T.tolist() == [0, 1]


def test_a_padding_id_inside_the_answer_stays_supervised():
    batch = collate_tokens([[5, 0, 0], [7, 8, 0]], [1, 1], pad_id=0)
    assert batch.target_T.tolist() == [0, 0, 8, 0]


def test_pairs_of_a_batch_are_shifted_by_the_rows_before_them():
    student = collate_tokens([[1, 2, 3], [1, 2, 3, 4]], [1, 1], pad_id=0)
    teacher = collate_tokens([[1, 2], [1, 2, 3]], [1, 1], pad_id=0)
    pair_student_A, pair_teacher_A = collate_pairs(student, teacher, [[1], [0, 2]], [[0], [0, 1]])
    assert pair_student_A.tolist() == [1, 2, 4]
    assert pair_teacher_A.tolist() == [0, 1, 2]


def test_pairs_survive_a_sequence_without_any():
    tokens = collate_tokens([[1, 2], [1, 2]], [1, 1], pad_id=0)
    pair_student_A, pair_teacher_A = collate_pairs(tokens, tokens, [[], [0]], [[], [0]])
    assert pair_student_A.tolist() == pair_teacher_A.tolist() == [1]


def test_a_batch_moves_to_a_device_as_a_whole():
    tokens = collate_tokens([[1, 2]], [1], pad_id=0)
    batch = DistillationBatch(tokens, None, None, None, step_tokens=1, step_pairs=1, num_tokens=2, examples=(0,))
    moved = batch.to(torch.device("meta"))
    assert moved.student.ids_BL.device.type == "meta"
    assert moved.step_tokens == 1 and moved.teacher is None
