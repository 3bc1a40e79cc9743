"""python -m rcm_jax.convert SOURCE OUT"""

from rcm_jax.convert.commands import main

if __name__ == "__main__":
    main()
