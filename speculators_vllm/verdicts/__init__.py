"""Does a speculator serve as it was trained, and is it lossless?"""
