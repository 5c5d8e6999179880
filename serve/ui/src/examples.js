// Structures to begin with; geometries as drawn, not relaxed.

export const EXAMPLES = {
  ethanol: ["ethanol.xyz", `9
ethanol
C 1.1879 -0.3829 0.0000
C 0.0000 0.5526 0.0000
O -1.1867 -0.2472 0.0000
H -1.9237 0.3850 0.0000
H 2.0985 0.2306 0.0000
H 1.1184 -1.0093 0.8869
H 1.1184 -1.0093 -0.8869
H -0.0227 1.1812 0.8852
H -0.0227 1.1812 -0.8852
`],
  benzene: ["benzene.xyz", `12
benzene
${Array.from({ length: 12 }, (_, index) => {
    const radius = index < 6 ? 1.395 : 2.482;
    const angle = (Math.PI / 3) * (index % 6);
    return `${index < 6 ? "C" : "H"} ${(radius * Math.cos(angle)).toFixed(4)} ${(radius * Math.sin(angle)).toFixed(4)} 0`;
  }).join("\n")}
`],
  diamond: ["POSCAR", `diamond, one atom aside
3.567
1 0 0
0 1 0
0 0 1
C
8
Direct
0.03 0.02 0.00
0.00 0.50 0.50
0.50 0.00 0.50
0.50 0.50 0.00
0.25 0.25 0.25
0.25 0.75 0.75
0.75 0.25 0.75
0.75 0.75 0.25
`],
};
