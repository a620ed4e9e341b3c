"""What several passes ask of a program: who depends on what, what a part of it computes, how it would quantize."""
