"""Chemical symbols by atomic number, for messages to people."""

_TABLE = (
    "X H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr "
    "Rb Sr Y Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb "
    "Lu Hf Ta W Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr Rf "
    "Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts Og"
)
_SYMBOLS = _TABLE.split()

MAX_ATOMIC_NUMBER = len(_SYMBOLS) - 1


def symbol(atomic_number: int) -> str:
    """The chemical symbol of an atomic number, or ``Z=…`` for numbers that name no element."""
    if 1 <= atomic_number <= MAX_ATOMIC_NUMBER:
        return _SYMBOLS[atomic_number]
    return f"Z={atomic_number}"
