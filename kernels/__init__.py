"""Operations with a plain reference and a faster version that gives the same answer; dispatch is in one place each."""
