"""A day on a GPU, in stages of minutes: python -m tests.gpu --stage 1 --out output/gpu   (docs/gpu-day.md)"""
