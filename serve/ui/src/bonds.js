// Pairs of atoms close enough to be drawn as bonded.

const SLACK = 1.2; // of the sum of covalent radii
const LEAST = 0.3; // Å; closer ones lie upon each other

/** @returns {[number, number][]} found in a grid of boxes as wide as the longest bond */
export function bonds(positions, numbers, radii) {
  const widest = Math.max(0.3, ...new Set(numbers.map((number) => radii[number])));
  const size = 2 * SLACK * widest;
  const boxes = new Map();
  const found = [];
  positions.forEach((position, index) => {
    const [i, j, k] = position.map((value) => Math.floor(value / size));
    for (let a = i - 1; a <= i + 1; a++) for (let b = j - 1; b <= j + 1; b++) for (let c = k - 1; c <= k + 1; c++) {
      for (const other of boxes.get(`${a},${b},${c}`) ?? []) {
        const far = Math.hypot(...position.map((value, axis) => value - positions[other][axis]));
        if (far > LEAST && far < SLACK * (radii[numbers[index]] + radii[numbers[other]])) found.push([other, index]);
      }
    }
    const key = `${i},${j},${k}`;
    if (boxes.has(key)) boxes.get(key).push(index);
    else boxes.set(key, [index]);
  });
  return found;
}
