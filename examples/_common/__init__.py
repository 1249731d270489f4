"""What the example scripts share: runs that can be resumed, flags, images, intervals, the look of the figures.

Not part of the flatmin package. A script finds it by putting the folder ``examples`` on ``sys.path``.
"""
