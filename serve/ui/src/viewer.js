// A structure in three dimensions: atoms, bonds, cell, forces.

import {
  AmbientLight, BufferGeometry, Color, CylinderGeometry, DirectionalLight, DynamicDrawUsage, ConeGeometry,
  Float32BufferAttribute, Group, InstancedMesh, LineBasicMaterial, LineSegments, Matrix4, Mesh,
  MeshBasicMaterial, MeshStandardMaterial, PerspectiveCamera, Quaternion, Raycaster, Scene, SphereGeometry,
  Vector2, Vector3, WebGLRenderer,
} from "three";
import { OrbitControls } from "three/examples/jsm/controls/OrbitControls.js";

import { bonds } from "./bonds.js";
import { showElements, showScales } from "./legend.js";

const BALL = 0.42; // of the covalent radius
const STICK = 0.1, SHAFT = 0.055, HEAD = 0.14; // Å
const LEAST_ARROW = 0.08; // Å; shorter ones would be dust on the atoms
const ROOM = 1.7; // Å around what is looked at, for balls and most arrows
const UP = new Vector3(0, 1, 0);
const CORNERS = [[0, 1], [0, 2], [0, 4], [1, 3], [1, 5], [2, 3], [2, 6], [3, 7], [4, 5], [4, 6], [5, 7], [6, 7]];

export class Viewer {
  constructor(place, elements, { onHover, onPick }) {
    this.place = place;
    this.elements = elements;
    this.options = { bonds: true, cell: true, repeat: 1, scale: 1, suspect: null };
    this.selected = null;
    this.scene = new Scene();
    this.camera = new PerspectiveCamera(28, 1, 0.1, 5000);
    this.renderer = new WebGLRenderer({ antialias: true, alpha: true });
    this.renderer.setPixelRatio(Math.min(2, window.devicePixelRatio));
    place.prepend(this.renderer.domElement);
    this.controls = new OrbitControls(this.camera, this.renderer.domElement);
    this.controls.addEventListener("change", () => this.paint());
    this.scene.add(new AmbientLight(0xffffff, 1.5), this.camera);
    const lamp = new DirectionalLight(0xffffff, 2.4);
    lamp.position.set(0.6, 1, 1);
    this.camera.add(lamp);
    const solid = () => new MeshStandardMaterial({ roughness: 0.55, metalness: 0.05 });
    this.kinds = {
      atoms: { geometry: new SphereGeometry(1, 28, 20), material: solid() },
      sticks: { geometry: new CylinderGeometry(1, 1, 1, 12, 1, true), material: solid() },
      shafts: { geometry: new CylinderGeometry(1, 1, 1, 12), material: solid() },
      heads: { geometry: new ConeGeometry(1, 1, 16), material: solid() },
    };
    this.meshes = {};
    this.lines = new LineSegments(new BufferGeometry(), new LineBasicMaterial());
    this.halo = new Mesh(this.kinds.atoms.geometry, new MeshBasicMaterial({ transparent: true, opacity: 0.3, depthWrite: false }));
    this.halo.visible = false;
    this.alarm = new Mesh(this.kinds.atoms.geometry, this.halo.material.clone());
    this.alarm.visible = false;
    this.group = new Group();
    this.group.add(this.lines, this.halo, this.alarm);
    this.scene.add(this.group);
    this.recolor();
    new ResizeObserver(() => this.resize()).observe(place);
    const canvas = this.renderer.domElement;
    let pressed = null;
    canvas.addEventListener("pointermove", (event) => event.buttons || onHover(this.pick(event), event));
    canvas.addEventListener("pointerleave", (event) => onHover(null, event));
    canvas.addEventListener("pointerdown", (event) => (pressed = [event.clientX, event.clientY]));
    canvas.addEventListener("pointerup", (event) => {
      const still = pressed && Math.hypot(event.clientX - pressed[0], event.clientY - pressed[1]) < 5;
      if (still) onPick(this.pick(event), event);
    });
  }

  /** Takes the page's colours, which light and dark change. */
  recolor() {
    const style = getComputedStyle(document.documentElement);
    const color = (name) => new Color(style.getPropertyValue(name).trim());
    this.lines.material.color = color("--cell");
    this.halo.material.color = color("--accent");
    this.alarm.material.color = color("--busy");
    this.arrowColor = color("--force");
    if (this.frame) this.draw();
  }

  /** Shows a frame of a track; looks at it anew if `look`. */
  show(track, frame, { look = false } = {}) {
    if (track !== this.track) showElements(track.atomic_numbers, this.elements);
    this.track = track;
    this.frame = frame;
    this.draw();
    if (look) this.look();
  }

  set(options) {
    Object.assign(this.options, options);
    if (this.frame) this.draw();
  }

  select(atom) {
    this.selected = atom;
    if (this.frame) this.draw();
  }

  draw() {
    const { track, frame, options, elements } = this;
    const shifts = this.shifts();
    const positions = shifts.flatMap((shift) => frame.positions.map((position) => position.map((value, axis) => value + shift[axis])));
    const numbers = shifts.flatMap(() => track.atomic_numbers);
    const n = track.atomic_numbers.length;
    const radius = (number) => BALL * Math.max(0.55, elements.radii[number]);
    this.fill("atoms", positions.map((position, index) => ({ at: new Vector3(...position), size: radius(numbers[index]), color: elements.colors[numbers[index]] })));
    const halves = [];
    if (options.bonds) {
      for (const [one, two] of bonds(positions, numbers, elements.radii)) {
        const a = new Vector3(...positions[one]), b = new Vector3(...positions[two]);
        const middle = a.clone().add(b).multiplyScalar(0.5);
        halves.push({ from: a, to: middle, width: STICK, color: elements.colors[numbers[one]] });
        halves.push({ from: middle, to: b, width: STICK, color: elements.colors[numbers[two]] });
      }
    }
    this.fill("sticks", halves);
    const shafts = [], heads = [];
    for (const [index, position] of positions.entries()) {
      const force = frame.forces?.[index % n];
      if (!force || force.includes(null)) continue;
      const along = new Vector3(...force).multiplyScalar(options.scale);
      const length = along.length();
      if (length < LEAST_ARROW) continue;
      const direction = along.clone().normalize();
      const begin = new Vector3(...position).addScaledVector(direction, 0.7 * radius(numbers[index]));
      const cone = Math.min(0.4, 0.5 * length);
      const neck = begin.clone().addScaledVector(direction, length - cone);
      shafts.push({ from: begin, to: neck, width: SHAFT, color: this.arrowColor });
      heads.push({ from: neck, to: neck.clone().addScaledVector(direction, cone), width: Math.min(HEAD, 0.45 * cone), color: this.arrowColor });
    }
    this.fill("shafts", shafts);
    this.fill("heads", heads);
    this.drawCell(shifts);
    for (const [ball, atom, size] of [[this.halo, this.selected, 1.45], [this.alarm, options.suspect, 1.7]]) {
      ball.visible = atom != null && atom < n;
      if (!ball.visible) continue;
      ball.position.set(...positions[atom]);
      ball.scale.setScalar(size * radius(numbers[atom]));
    }
    Object.assign(this.place.dataset, { atoms: positions.length, bonds: halves.length / 2, arrows: heads.length });
    this.paint();
  }

  shifts() {
    const { repeat } = this.options;
    const times = this.track.pbc.map((flag) => (flag ? repeat : 1));
    const shifts = [];
    for (let i = 0; i < times[0]; i++) for (let j = 0; j < times[1]; j++) for (let k = 0; k < times[2]; k++) {
      shifts.push([0, 1, 2].map((axis) => i * this.frame.cell[0][axis] + j * this.frame.cell[1][axis] + k * this.frame.cell[2][axis]));
    }
    return shifts;
  }

  drawCell(shifts) {
    const { cell } = this.frame;
    const points = [];
    if (this.options.cell && cell.flat().some(Boolean)) {
      for (const shift of shifts) {
        const corner = (bits) => [0, 1, 2].map((axis) => shift[axis] + cell.reduce((sum, vector, place) => sum + ((bits >> place) & 1) * vector[axis], 0));
        for (const [one, two] of CORNERS) points.push(...corner(one), ...corner(two));
      }
    }
    this.lines.geometry.dispose();
    this.lines.geometry = new BufferGeometry().setAttribute("position", new Float32BufferAttribute(points, 3));
  }

  fill(kind, things) {
    let mesh = this.meshes[kind];
    if (!mesh || mesh.instanceMatrix.count < things.length) {
      if (mesh) {
        this.group.remove(mesh);
        mesh.dispose();
      }
      const { geometry, material } = this.kinds[kind];
      mesh = this.meshes[kind] = new InstancedMesh(geometry, material, Math.max(16, Math.ceil(1.5 * things.length)));
      mesh.instanceMatrix.setUsage(DynamicDrawUsage);
      mesh.frustumCulled = false;
      this.group.add(mesh);
    }
    const matrix = new Matrix4(), turn = new Quaternion(), color = new Color();
    things.forEach((thing, index) => {
      if (thing.at) matrix.compose(thing.at, turn.identity(), new Vector3(thing.size, thing.size, thing.size));
      else {
        const along = thing.to.clone().sub(thing.from);
        const length = along.length();
        turn.setFromUnitVectors(UP, along.normalize());
        matrix.compose(thing.from.clone().add(thing.to).multiplyScalar(0.5), turn, new Vector3(thing.width, Math.max(length, 1e-6), thing.width));
      }
      mesh.setMatrixAt(index, matrix);
      mesh.setColorAt(index, color.set(thing.color));
    });
    mesh.count = things.length;
    mesh.instanceMatrix.needsUpdate = true;
    if (mesh.instanceColor) mesh.instanceColor.needsUpdate = true;
    mesh.boundingSphere = null;
  }

  /** Looks at all of it from the front, a little from above. */
  look() {
    const points = this.shifts().flatMap((shift) => [
      ...this.frame.positions.map((position) => position.map((value, axis) => value + shift[axis])),
      ...(this.frame.cell.flat().some(Boolean) ? [shift, [0, 1, 2].map((axis) => shift[axis] + this.frame.cell.reduce((sum, vector) => sum + vector[axis], 0))] : []),
    ]);
    const low = [0, 1, 2].map((axis) => points.reduce((least, point) => Math.min(least, point[axis]), Infinity));
    const high = [0, 1, 2].map((axis) => points.reduce((most, point) => Math.max(most, point[axis]), -Infinity));
    const middle = new Vector3(...low.map((value, axis) => (value + high[axis]) / 2));
    const radius = Math.max(1.5, ...points.map((point) => middle.distanceTo(new Vector3(...point)))) + ROOM;
    const narrow = Math.min(1, this.camera.aspect);
    const far = radius / Math.sin((this.camera.fov * Math.PI) / 360) / narrow;
    this.controls.target.copy(middle);
    this.camera.position.copy(middle).addScaledVector(new Vector3(0.35, 0.3, 1).normalize(), far);
    this.camera.near = far / 100;
    this.camera.far = far * 10;
    this.camera.updateProjectionMatrix();
    this.controls.update();
    this.paint();
  }

  pick(event) {
    const mesh = this.meshes.atoms;
    if (!mesh || !this.frame) return null;
    const box = this.renderer.domElement.getBoundingClientRect();
    const at = new Vector2(((event.clientX - box.left) / box.width) * 2 - 1, 1 - ((event.clientY - box.top) / box.height) * 2);
    const ray = new Raycaster();
    ray.setFromCamera(at, this.camera);
    const hit = ray.intersectObject(mesh)[0];
    return hit ? hit.instanceId % this.track.atomic_numbers.length : null;
  }

  resize() {
    const { clientWidth: width, clientHeight: height } = this.place;
    if (!width || !height) return;
    this.renderer.setSize(width, height);
    this.camera.aspect = width / height;
    this.camera.updateProjectionMatrix();
    this.paint();
  }

  paint() {
    this.wanted ??= requestAnimationFrame(() => {
      this.wanted = undefined;
      if (this.frame) {
        const far = this.camera.position.distanceTo(this.controls.target);
        const high = 2 * far * Math.tan((this.camera.fov * Math.PI) / 360);
        showScales(this.place.clientHeight / high, this.meshes.heads?.count ? this.options.scale : 0);
      }
      this.renderer.render(this.scene, this.camera);
    });
  }
}
