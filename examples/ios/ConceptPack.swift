// A pack of concepts: `pack.mlpackage` and `pack.json` as `farm export --format coreml` writes them.
// iOS 18 or later. Read-checked only: no Swift compiler was at hand where this was written.

import CoreML
import CoreVideo
import CryptoKit
import Foundation

/// What `pack.json` says.
struct PackDescription: Decodable {
    struct Concept: Decodable {
        let concept: String
        let adapter: String
        let function: String
    }

    let side: Int
    let base: String
    let concepts: [Concept]
}

enum PackError: Error {
    case unknownConcept(String)
    case noImage
    case otherPack
    case damagedUpdate
}

/// Loads a pack once and its concepts one by one, each when it is first asked for: a function of the package is a model
/// of its own, and all of them read the same weights.
actor ConceptPack {
    let description: PackDescription
    private let compiled: URL
    private let units: MLComputeUnits
    private var models: [String: MLModel] = [:]

    /// folder: where the pack's files lie. Compiling takes seconds; keep what it returns and pass it again as `compiled`.
    init(folder: URL, compiled: URL? = nil, units: MLComputeUnits = .all) async throws {
        let json = JSONDecoder()
        description = try json.decode(PackDescription.self, from: Data(contentsOf: folder.appending(path: "pack.json")))
        self.units = units
        if let compiled {
            self.compiled = compiled
        } else {
            self.compiled = try await MLModel.compileModel(at: folder.appending(path: "pack.mlpackage"))
        }
    }

    /// Where the compiled package is: move it out of the temporary folder to keep it.
    var location: URL { compiled }

    nonisolated var names: [String] { description.concepts.map(\.concept) }

    /// The model of a concept; the first call for it takes as long as the device needs to prepare it.
    func model(_ concept: String) async throws -> MLModel {
        if let known = models[concept] { return known }
        guard let entry = description.concepts.first(where: { $0.concept == concept }) else {
            throw PackError.unknownConcept(concept)
        }
        let configuration = MLModelConfiguration()
        configuration.functionName = entry.function
        configuration.computeUnits = units
        let model = try await MLModel.load(contentsOf: compiled, configuration: configuration)
        models[concept] = model
        return model
    }

    /// Lets go of a concept's memory.
    func forget(_ concept: String) { models[concept] = nil }

    /// Edits a square image of `description.side` pixels; `PixelBuffers.square` cuts and scales one.
    func edit(_ image: CVPixelBuffer, concept: String) async throws -> CVPixelBuffer {
        let input = try MLDictionaryFeatureProvider(dictionary: ["image": MLFeatureValue(pixelBuffer: image)])
        let output = try await model(concept).prediction(from: input)
        guard let edited = output.featureValue(for: "edited")?.imageBufferValue else { throw PackError.noImage }
        return edited
    }
}

/// What `farm export --since PACK --out …` writes, put together with the package that the phone has.
enum PackUpdate {
    private struct Description: Decodable {
        let weights_before_sha256: String
        let weights_head: Data
        let weights_sha256: String
    }

    /// old, new: `pack.mlpackage` folders. update: the folder with `update.json`.
    static func apply(_ update: URL, to old: URL, as new: URL) throws {
        let files = FileManager.default
        let inside = "Data/com.apple.CoreML/weights/weight.bin"
        let told = try JSONDecoder().decode(Description.self, from: Data(contentsOf: update.appending(path: "update.json")))
        var weights = try Data(contentsOf: old.appending(path: inside))
        guard hash(weights) == told.weights_before_sha256 else { throw PackError.otherPack }
        weights.replaceSubrange(0..<told.weights_head.count, with: told.weights_head)
        weights.append(try Data(contentsOf: update.appending(path: "weights.append")))
        guard hash(weights) == told.weights_sha256 else { throw PackError.damagedUpdate }
        let target = new.appending(path: inside)
        try files.createDirectory(at: target.deletingLastPathComponent(), withIntermediateDirectories: true)
        try weights.write(to: target, options: .atomic)
        for (name, place) in [("model.mlmodel", "Data/com.apple.CoreML/model.mlmodel"), ("Manifest.json", "Manifest.json")] {
            try files.copyItem(at: update.appending(path: name), to: new.appending(path: place))
        }
    }

    private static func hash(_ data: Data) -> String {
        SHA256.hash(data: data).map { String(format: "%02x", $0) }.joined()
    }
}
