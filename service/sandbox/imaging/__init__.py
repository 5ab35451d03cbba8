"""The four kinds of work, for real though without a model.

intake.py     is this an image that can be worked on? (Pillow alone, since every submit asks)
studio.py     one task: its image in, its results out
picture.py    images as arrays: reading, writing, bounds
upscale.py  vector.py  faces.py  seamless.py
"""
