// The camera through a concept, at 30 frames a second where the phone keeps up; frames that come while one is edited are
// dropped. Read-checked only: no Swift compiler was at hand where this was written.

import AVFoundation
import CoreImage
import SwiftUI

/// Square BGRA images of one size from whatever the camera gives.
final class PixelBuffers {
    private let context = CIContext()
    private var pool: CVPixelBufferPool?
    let side: Int

    init(side: Int) {
        self.side = side
        let attributes: [CFString: Any] = [
            kCVPixelBufferPixelFormatTypeKey: kCVPixelFormatType_32BGRA,
            kCVPixelBufferWidthKey: side,
            kCVPixelBufferHeightKey: side,
            kCVPixelBufferIOSurfacePropertiesKey: [:] as CFDictionary,
        ]
        CVPixelBufferPoolCreate(nil, nil, attributes as CFDictionary, &pool)
    }

    /// The middle of the picture.
    func square(_ image: CVPixelBuffer) -> CVPixelBuffer? {
        guard let pool else { return nil }
        let source = CIImage(cvPixelBuffer: image)
        let edge = min(source.extent.width, source.extent.height)
        let left = (source.extent.width - edge) / 2, bottom = (source.extent.height - edge) / 2
        let scale = CGFloat(side) / edge
        let cut = source
            .cropped(to: CGRect(x: left, y: bottom, width: edge, height: edge))
            .transformed(by: CGAffineTransform(translationX: -left, y: -bottom))
            .transformed(by: CGAffineTransform(scaleX: scale, y: scale))
        var target: CVPixelBuffer?
        CVPixelBufferPoolCreatePixelBuffer(nil, pool, &target)
        guard let target else { return nil }
        context.render(cut, to: target)
        return target
    }

    func picture(_ image: CVPixelBuffer) -> CGImage? {
        let source = CIImage(cvPixelBuffer: image)
        return context.createCGImage(source, from: source.extent)
    }
}

/// Camera frames in, edited pictures out.
final class ConceptCamera: NSObject, ObservableObject, AVCaptureVideoDataOutputSampleBufferDelegate {
    @Published private(set) var picture: CGImage?
    @Published private(set) var milliseconds = 0.0
    @Published var concept: String

    private let pack: ConceptPack
    private let buffers: PixelBuffers
    private let session = AVCaptureSession()
    private let queue = DispatchQueue(label: "camera")
    private var busy = false  // touched on `queue` alone

    init(pack: ConceptPack) {
        self.pack = pack
        buffers = PixelBuffers(side: pack.description.side)
        concept = pack.names[0]
    }

    func start() throws {
        guard let camera = AVCaptureDevice.default(.builtInWideAngleCamera, for: .video, position: .back) else { return }
        session.beginConfiguration()
        session.sessionPreset = .vga640x480
        session.addInput(try AVCaptureDeviceInput(device: camera))
        let output = AVCaptureVideoDataOutput()
        output.videoSettings = [kCVPixelBufferPixelFormatTypeKey as String: kCVPixelFormatType_32BGRA]
        output.alwaysDiscardsLateVideoFrames = true
        output.setSampleBufferDelegate(self, queue: queue)
        session.addOutput(output)
        output.connection(with: .video)?.videoRotationAngle = 90
        session.commitConfiguration()
        try camera.lockForConfiguration()
        camera.activeVideoMinFrameDuration = CMTime(value: 1, timescale: 30)
        camera.unlockForConfiguration()
        queue.async { self.session.startRunning() }
    }

    func captureOutput(_ output: AVCaptureOutput, didOutput sample: CMSampleBuffer, from connection: AVCaptureConnection) {
        guard !busy, let frame = CMSampleBufferGetImageBuffer(sample), let square = buffers.square(frame) else { return }
        busy = true
        Task {
            let chosen = await MainActor.run { self.concept }
            let started = ContinuousClock.now
            let edited = try? await pack.edit(square, concept: chosen)
            let seconds = (ContinuousClock.now - started) / .seconds(1)
            let shown = edited.flatMap { buffers.picture($0) }
            await MainActor.run {
                if let shown { self.picture = shown }
                self.milliseconds = seconds * 1000
            }
            queue.async { self.busy = false }
        }
    }
}

struct CameraView: View {
    @StateObject var camera: ConceptCamera
    let names: [String]

    var body: some View {
        VStack {
            if let picture = camera.picture {
                Image(decorative: picture, scale: 1).resizable().aspectRatio(1, contentMode: .fit)
            }
            Text("\(camera.milliseconds, specifier: "%.1f") ms")
            Picker("Concept", selection: $camera.concept) {
                ForEach(names, id: \.self) { Text($0) }
            }
            .pickerStyle(.wheel)
        }
        .onAppear { try? camera.start() }
    }
}
