"""What a GPU makes of the library, in one short command: `python -m imagewright.bench.gpu --out FOLDER --minutes 9`.

    a  matrix and copy rates of the card            d  updates of scd, dmd2, ctm and md4 at ImageNet-64 size
    b  a training step of the ADM ImageNet-64       e  the same step sharded, and with activations recomputed
       network (296 M) with EDM                     f  emoji at 64x64: a teacher, a one-step student, grids and scores
    c  sampling at 35 calls and at one             t  the tests that need a card

Every part has its share of the minutes, and an end at them; what it had measured until then is kept, and what failed
is written down as what it was. gpu.json is written after every part.
"""
