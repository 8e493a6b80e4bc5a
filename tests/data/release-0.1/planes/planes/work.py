
FACTOR = 10


def scaled(n):
    """Ten times as much"""
    return n * FACTOR


def unused(n):
    return n
