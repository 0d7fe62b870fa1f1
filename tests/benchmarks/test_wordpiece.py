from benchmarks.wordpiece import WordPiece


def test_words_are_cut_into_the_longest_known_pieces() -> None:
    tokenizer = WordPiece(["[CLS]", "[SEP]", "[UNK]", "play", "##ing", "##s", "p", "."])
    assert tokenizer.encode("Playing plays. q", 16) == [0, 3, 4, 3, 5, 7, 2, 1]
    assert tokenizer.encode("Playing plays.", 4) == [0, 3, 4, 1]
