// Frames of a camera or of a file, as JPEGs, as many as are wanted, at the rate at which the network plays.

export class Input {
  static async camera(video, on) {
    const stream = await navigator.mediaDevices.getUserMedia({ video: { width: 640 }, audio: false });
    video.srcObject = stream;
    return new Input(video, on)._begin();
  }

  static async file(video, file, on) {
    video.srcObject = null;
    video.src = URL.createObjectURL(file);
    const input = new Input(video, on);
    input.held = true; // until the first frames are wanted: a program may have to be compiled before
    video.onended = () => input.end();
    return input._begin();
  }

  constructor(video, on) {
    Object.assign(this, { video, on, wanted: 0, canvas: document.createElement("canvas") });
  }

  async _begin() {
    this.video.hidden = false;
    if (!this.held) await this.video.play();
    this.timer = setInterval(() => this._take(), 1000 / this.on.fps());
    return this;
  }

  want(frames) {
    this.wanted = frames;
    if (!this.held) return;
    this.held = false;
    this.video.play().catch(() => this.end());
  }

  _take() {
    const { video, canvas } = this;
    if (this.wanted < 1 || !video.videoWidth) return;
    this.wanted -= 1;
    const [width, height] = this.on.size();
    const scale = Math.max(width / video.videoWidth, height / video.videoHeight);
    const [w, h] = [video.videoWidth * scale, video.videoHeight * scale];
    Object.assign(canvas, { width, height });
    canvas.getContext("2d").drawImage(video, (width - w) / 2, (height - h) / 2, w, h);
    canvas.toBlob((blob) => blob && this.on.send(blob), "image/jpeg", 0.92);
  }

  end() {
    clearInterval(this.timer);
    this.on.ended();
  }

  close() {
    clearInterval(this.timer);
    this.video.srcObject?.getTracks().forEach((track) => track.stop());
    this.video.removeAttribute("src");
    this.video.srcObject = null;
    this.video.hidden = true;
  }
}
